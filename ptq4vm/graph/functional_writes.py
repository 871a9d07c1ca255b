"""Rewrites changes of tensors in place as new values: `y[:, 0] = x` becomes a `select_scatter` that later readers read.

torch.export can do the same by tracing a program again, which takes longer than the export itself. What is not certain
here is left to it: writes to inputs and parameters, and through views that may be copies.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Graph, GraphModule, Node

from ptq4vm.graph.insert import Insertion, arguments, aten

_END = 2**62
"""Ends of slices from here on mean all."""


def is_write(node: Node) -> bool:
    """Returns whether a node changes an argument in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def drop_detachings(graph: Graph) -> None:
    """Erases `detach_`, which changes no element, in place: torch.export writes it of constants made in forward."""
    for node in graph.find_nodes(op="call_function", target=aten.detach_.default):
        node.replace_all_uses_with(_unwritten(node))
        graph.erase_node(node)


def can_rewrite(graph: Graph) -> bool:
    """Returns whether `rewrite_writes` knows what every write of a graph changes."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    families = _families(graph)
    for write in filter(is_write, graph.nodes):
        *views, root = _chain(write.args[0])
        if root.op != "call_function" or not _is_tensor(root) or _functional(write) is None:
            return False
        # views that are read after the write are made again, which a copy must not be
        stale = [alias for alias in families[root] if place[alias] < place[write] < _last_reading(alias, place)]
        if not all(_is_plain(view) for view in (*views, *(link for each in stale for link in _chain(each)[:-1]))):
            return False
    return True


def rewrite_writes(gm: GraphModule) -> None:
    """Replaces the writes of a graph, in place."""
    roots = dict.fromkeys(_chain(node)[-1] for node in gm.graph.nodes if is_write(node))
    for root, aliases in _families(gm.graph).items():
        if root in roots:
            _Versions(gm, root, aliases).rewrite()


class _Versions:
    """The values that a tensor and its views have after every write."""

    def __init__(self, gm: GraphModule, root: Node, aliases: list[Node]) -> None:
        self.gm, self.count = gm, 0
        self.sources = {alias: _chain(alias)[1] for alias in aliases if alias is not root}
        self.latest: dict[Node, tuple[int, Node]] = {root: (0, root)}

    def rewrite(self) -> None:
        (root,) = self.latest
        nodes = list(self.gm.graph.nodes)
        for node in nodes[nodes.index(root) + 1 :]:
            insert = Insertion(self.gm, node)
            if is_write(node) and _unwritten(node) in self.latest:
                self._write(insert, node)
                continue
            for source in node.all_input_nodes:
                node.replace_input_with(source, self._read(insert, source))
            if node in self.sources:
                self.latest[node] = (self.count, node)
        for node in reversed(nodes):
            if is_write(node) and _unwritten(node) in self.latest:
                self.gm.graph.erase_node(node)

    def _write(self, insert: Insertion, write: Node) -> None:
        chain = [_unwritten(write)]
        while chain[-1] in self.sources:
            chain.append(self.sources[chain[-1]])
        values = [self._value(insert, node) for node in chain]
        rest = fx.map_arg(write.args[1:], lambda source: self._read(insert, source))
        new = _written(insert, write, values[0], rest)
        self.count += 1
        self.latest[chain[0]] = (self.count, new)
        for view, source, value in zip(chain, chain[1:], values[1:], strict=False):
            new = _scattered(insert, view, value, new)
            self.latest[source] = (self.count, new)

    def _read(self, insert: Insertion, node: Node) -> Node:
        """Returns what a node that is read at this point of the graph holds."""
        return self._value(insert, _unwritten(node)) if _unwritten(node) in self.latest else node

    def _value(self, insert: Insertion, node: Node) -> Node:
        """Returns a tensor or a view as it is after the last write."""
        count, value = self.latest[node]
        if count != self.count:
            source = self._value(insert, self.sources[node])
            value = insert.call(node.target, source, *node.args[1:])
            self.latest[node] = (self.count, value)
        return value


def _written(insert: Insertion, write: Node, target: Node, rest: Sequence[Any]) -> Node:
    """Inserts what a write with the other arguments `rest` puts in the place of its target."""
    before = target.meta["val"]
    if write.target is aten.copy_.default and isinstance(rest[0], Node):
        value = rest[0].meta["val"]
        if (value.shape, value.dtype, value.device) == (before.shape, before.dtype, before.device):
            return rest[0]
    new = insert.call(_functional(write), target, *rest)
    new.kwargs = write.kwargs
    return new if new.meta["val"].dtype is before.dtype else insert.call(aten.to.dtype, new, before.dtype)


def _scattered(insert: Insertion, view: Node, source: Node, new: Node) -> Node:
    """Inserts the source of a view with what the view shows replaced."""
    _, *rest = arguments(view)
    if view.target is aten.select.int:
        return insert.call(aten.select_scatter.default, source, new, *rest)
    if view.target is aten.slice.Tensor:
        axis, start, end, step = rest
        whole = start in (None, 0) and (end is None or (isinstance(end, int) and end >= _END)) and step == 1
        return new if whole else insert.call(aten.slice_scatter.default, source, new, axis, start, end, step)
    if view.target is aten.narrow.default:
        axis, start, length = rest
        return insert.call(aten.slice_scatter.default, source, new, axis, start, start + length)
    if view.target is aten.permute.default:
        rank = len(rest[0])
        order = [axis % rank for axis in rest[0]]
        return insert.call(aten.permute.default, new, [order.index(axis) for axis in range(rank)])
    if view.target in (aten.transpose.int, aten.t.default):
        return insert.call(view.target, new, *rest)
    if view.target is aten.unsqueeze.default:
        return insert.call(aten.squeeze.dim, new, *rest)
    return new


_PLAIN = {
    aten.alias.default,
    aten.detach.default,
    aten.narrow.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
}
"""Views that never copy, whose sources can be made from what they show."""


def _is_plain(view: Node) -> bool:
    return view.target in _PLAIN and not view.kwargs and all(not isinstance(value, Node) for value in view.args[1:])


def _functional(write: Node) -> Any:
    """Returns the operator that computes what a write puts in the place of its first argument; None without one."""
    target: Any = write.target
    changed = [value.alias_info is not None and value.alias_info.is_write for value in target._schema.arguments]
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_") or not changed[0] or any(changed[1:]):
        return None
    found = getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    return found if found is not None and not found._schema.is_mutable else None


def _families(graph: Graph) -> dict[Node, list[Node]]:
    """Returns the views of each value that has some, and the value, in order."""
    families: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if not is_write(node):
            families.setdefault(_chain(node)[-1], []).append(node)
    return families


def _last_reading(alias: Node, place: dict[Node, int]) -> int:
    return max((place[user] for user in _readers(alias)), default=-1)


def _readers(node: Node) -> Iterator[Node]:
    """Yields what reads a value, also by the name of a write to it."""
    for user in node.users:
        yield user
        if is_write(user) and user.args[0] is node:
            yield from _readers(user)


def _chain(node: Any) -> list[Node]:
    """Returns a node, what it may be a view of, and so on to a value that is computed; a write is what it writes to."""
    chain = [_unwritten(node)]
    while _may_alias(chain[-1]):
        chain.append(_unwritten(chain[-1].args[0]))
    return chain


def _unwritten(node: Any) -> Any:
    while is_write(node):
        node = node.args[0]
    return node


def _may_alias(node: Node) -> bool:
    """Returns whether a result may share memory with the first argument."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in (operator.getitem, aten.dropout.default):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(value.alias_info is not None for value in schema.returns)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
