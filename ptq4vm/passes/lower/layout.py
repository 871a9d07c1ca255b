"""Writes values in channels-last order, and movements of elements as the shortest chain from where they come from.

    permute → silu → permute                       ⇒ silu
    stack of K linears → view → split → select     ⇒ a slice of one linear
    residual sums of (B, C, H, W)                  ⇒ sums of (B, H, W, C)

Element-wise operators move before the permutations of their inputs, which then cancel. What comes from where is found
by numbers of elements, never by the views themselves, so it does not matter how a model spells them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from ptq4vm.graph.element_numbers import IMAGES, ElementNumbers, moves_elements
from ptq4vm.graph.insert import Insertion, aten, attribute
from ptq4vm.graph.token_order import TokenMap, decoded
from ptq4vm.passes.lower.patterns import args, only_user

_CHANNELS_SECOND = {
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default,
    aten.batch_norm.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.group_norm.default,
    aten.max_pool2d.default,
}
"""Operators whose results have their channels on the second axis."""


def simplify_layouts(gm: GraphModule) -> GraphModule:
    """Moves element-wise operators before permutations, and shortens movements; values stay equal."""
    if gm.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        return gm  # it reads memory, not elements
    layouts = _Layouts(gm)
    contiguous = {node: _contiguous_inputs(node) for node in gm.graph.nodes if _reads_memory(node)}
    nodes = list(gm.graph.nodes)
    ahead = set(nodes)
    for node in nodes:
        read = node.all_input_nodes
        layouts.visit(node)
        ahead.discard(node)
        for value in read:
            if ahead.isdisjoint(value.users):
                layouts.numbers.forget(value)
    for node, before in contiguous.items():
        for value, was in zip(_inputs(node), before, strict=True):
            if was and not _is_contiguous(value):
                node.replace_input_with(value, Insertion(gm, node).call(aten.contiguous.default, value))
    return gm


def _reads_memory(node: Node) -> bool:
    """Returns whether strides matter to what reads a value: operators of others, the model's caller."""
    own = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "ptq4vm")
    return node.op == "output" or node.target in _OF_MEMORY or not (own or node.op in ("placeholder", "get_attr"))


_OF_MEMORY = {aten.view_as_complex.default, aten.view_as_real.default, aten.view.dtype}


def _inputs(node: Node) -> list[Any]:
    return [value for value in tree_leaves((node.args, node.kwargs)) if isinstance(value, Node)]


def _contiguous_inputs(node: Node) -> list[bool]:
    return [_is_contiguous(value) for value in _inputs(node)]


def _is_contiguous(value: Node) -> bool:
    found = value.meta.get("val")
    return isinstance(found, Tensor) and found.is_contiguous()


class _Layouts:
    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.numbers = gm, ElementNumbers()
        self.made: dict[tuple[Any, ...], Node] = {}

    def _has_images(self, value: Any) -> bool:
        """Returns whether a value is a tensor of images: in a graph for so many, one that depends on its inputs."""
        found = value.meta.get("val") if isinstance(value, Node) else None
        return isinstance(found, Tensor) and (not _is_fixed(found) or self.numbers.is_data(value))

    def visit(self, node: Node) -> None:
        """Rewrites what a node reads; movements that nothing reads any more are dead code."""
        if node.op != "call_function":
            return
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # strides are not what they were
        if moves_elements(node) or (_is_pointwise(node) and self._sink(node)):
            return
        for value in node.all_input_nodes:
            if (shorter := self._shortened(node, value)) is not None:
                node.replace_input_with(value, shorter)
        if node.target in _CHANNELS_SECOND and node.meta["val"].dim() > 2:
            self._put_channels_last(node)

    def _put_channels_last(self, node: Node) -> None:
        insert, rank = Insertion(self.gm, node.next), node.meta["val"].dim()
        user = only_user(node)
        if user is not None and user.target is aten.permute.default and list(args(user)[1]) == [0, *range(2, rank), 1]:
            self.numbers.stop_at(user)
            return
        last = _moved(insert, node, 1, rank - 1)
        self.numbers.stop_at(last)
        back = _moved(insert, last, rank - 1, 1)
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not last)

    # --- element-wise operators ---

    def _sink(self, node: Node) -> bool:
        """Computes an element-wise operator before the permutation of its inputs; returns whether it is done."""
        operands = [value for value in args(node) if self._has_images(value)]
        shape = node.meta["val"].shape
        if any(isinstance(value, Node) for value in node.kwargs.values()) or node.meta["val"].dim() < 3:
            return False
        if not operands or any(value.meta["val"].dim() != len(shape) for value in operands):
            return False
        numbers = [found for value in operands if (found := self.numbers.of(value)) is not None]
        if len(numbers) < len(operands):
            return False
        whole = [found for value, found in zip(operands, numbers, strict=True) if value.meta["val"].shape == shape]
        if any(self.numbers.source(found) is None for found in numbers):
            return len(whole) == len(numbers) and self._split(node, numbers)
        last = len(shape) - 1  # gates of all tokens, which are broadcast, go where the others do
        axes = {axis for found in whole if (axis := _channel_axis(found)) not in (None, last)}
        if len(axes) != 1:
            return False
        (axis,) = axes
        insert = Insertion(self.gm, node)
        arguments = [self._channels_last(insert, value, axis, len(shape)) for value in args(node)]
        sunk = insert.call(node.target, *arguments)
        sunk.kwargs = node.kwargs
        self._replace(node, _moved(insert, sunk, last, axis))
        return True

    def _channels_last(self, insert: Insertion, value: Any, axis: int, rank: int) -> Any:
        """An operand of an element-wise operator with its axis `axis` last."""
        if self._has_images(value):
            moved = _moved(insert, value, axis, rank - 1)
            return self._shortened(insert.before, moved, insert) or moved
        if not isinstance(value, Node) or value.meta["val"].dim() == 0:
            return value
        whole = insert.call(aten.reshape.default, value, _with_ones(value.meta["val"].shape, rank))
        return _moved(insert, whole, axis, rank - 1)

    def _split(self, node: Node, numbers: Sequence[Tensor]) -> bool:
        """Computes an element-wise operator on each part of a stack; returns whether it is done."""
        rank = node.meta["val"].dim()
        stacked = (axis for axis in range(1, rank) if all(self.numbers.is_stacked(found, axis) for found in numbers))
        axis = next(stacked, None)
        if axis is None:
            return False
        insert, parts = Insertion(self.gm, node), []
        for i in range(numbers[0].shape[axis]):
            arguments = []
            for value in args(node):
                if isinstance(value, Node) and value.meta["val"].dim():
                    whole = value
                    if not self._has_images(value):
                        whole = insert.call(aten.reshape.default, value, _with_ones(value.meta["val"].shape, rank))
                    single = whole.meta["val"].shape[axis] == 1
                    value = insert.call(aten.select.int, whole, axis, 0 if single else i)
                arguments.append(value)
            part = insert.call(node.target, *arguments)
            part.kwargs = node.kwargs
            parts.append(part)
        result = insert.call(aten.stack.default, parts, axis)
        for part in parts:
            self.visit(part)
        self._replace(node, result)
        return True

    def _replace(self, node: Node, result: Node) -> None:
        node.replace_all_uses_with(result)
        self.gm.graph.erase_node(node)

    # --- movements ---

    def _shortened(self, reader: Node, value: Node, insert: Insertion | None = None) -> Node | None:
        """Returns a shorter chain that makes the same value for its reader; None where there is none."""
        if not self._has_images(value) or not moves_elements(value) or value.meta["val"].dim() < 3:
            return None
        numbers = self.numbers.of(value)
        source = None if numbers is None else self.numbers.source(numbers)
        if numbers is None or source is None or source is value:
            return None
        axis, last = _channel_axis(numbers), numbers.dim() - 1
        if axis is None:
            return None
        found = decoded(self.numbers, numbers.movedim(axis, last))
        if found is None:
            return None
        chain = _Chain.of(found, self.numbers, numbers.movedim(axis, last).shape)
        length, joined = self._length(value, source)
        permuted = axis != last
        if chain is None or not (joined or (chain.steps + permuted < length and chain.moves_nothing)):
            return None
        key = (found.source, chain.key, axis)
        if key not in self.made:
            insert = insert or Insertion(self.gm, reader)
            made = chain.emit(insert, found.source)
            self.made[key] = _moved(insert, made, last, axis) if permuted else made
        return self.made[key]

    def _length(self, value: Node, source: Node) -> tuple[int, bool]:
        """Returns how many movements lie between, and whether one of them joins several values."""
        seen: dict[Node, None] = {}
        waiting, joined = [value], False
        while waiting:
            node = waiting.pop()
            if node in seen or node is source or not moves_elements(node):
                continue
            seen[node] = None
            inputs = [each for each in node.all_input_nodes if not _is_size(each)]
            joined |= len([each for each in inputs if each.op != "get_attr"]) > 1
            waiting += inputs
        return len(seen), joined


class _Chain:
    """Slice of channels, order of tokens and shape that make a value of its source."""

    def __init__(self, found: TokenMap, channels: int, tokens: int, sizes: Sequence[int], shape: Sequence[int]) -> None:
        self.first, self.last, self.channels = found.first, found.last, channels
        self.tokens, self.count = found.tokens, tokens
        self.sizes, self.shape = list(sizes), list(shape)

    @classmethod
    def of(cls, found: TokenMap, numbers: ElementNumbers, shape: Sequence[int]) -> "_Chain | None":
        """Returns the chain to a value of that shape."""
        source = numbers.of(found.source)
        if source is None:
            return None
        channels = source.shape[-1]
        return cls(found, channels, numbers.count(found.source) // channels, source.shape, shape)

    @property
    def moves_nothing(self) -> bool:
        """Whether tokens keep their order."""
        return torch.equal(self.tokens, torch.arange(self.count))

    @property
    def is_reversed(self) -> bool:
        return torch.equal(self.tokens, torch.arange(self.count - 1, -1, -1))

    @property
    def cuts(self) -> bool:
        return (self.first, self.last) != (0, self.channels)

    @property
    def final(self) -> list[int]:
        """Shape before the value is put in its own."""
        if self.moves_nothing:
            return [*self.sizes[:-1], self.last - self.first]
        return [IMAGES, len(self.tokens), self.last - self.first]

    @property
    def is_flat(self) -> bool:
        """Whether the source is (B, L, C): its own tokens are on one axis, and no windows beside the images."""
        return self.sizes[:-1] == [IMAGES, self.count]

    @property
    def steps(self) -> int:
        ordered = 0 if self.moves_nothing else 1 + (not self.is_flat)
        return self.cuts + ordered + (self.final != self.shape)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.first, self.last, self.tokens.numpy().tobytes(), tuple(self.shape)

    def emit(self, insert: Insertion, source: Node) -> Node:
        """Inserts the chain."""
        x = source
        if self.cuts:
            x = insert.call(aten.slice.Tensor, x, len(self.sizes) - 1, self.first, self.last)
        if not self.moves_nothing:
            if not self.is_flat:
                x = insert.call(aten.reshape.default, x, [-1, self.count, self.last - self.first])
            x = insert.call(aten.flip.default, x, [1]) if self.is_reversed else self._indexed(insert, x)
        if self.final != self.shape:
            x = insert.call(aten.reshape.default, x, [-1, *self.shape[1:]])
        return x

    def _indexed(self, insert: Insertion, x: Node) -> Node:
        padding = self.tokens < 0
        if padding.any():
            x = insert.call(aten.constant_pad_nd.default, x, [0, 0, 0, 1])
        order = torch.where(padding, self.count, self.tokens)
        name = f"token_order_{len(order)}"
        taken, count = name, 0
        while hasattr(insert.gm, taken):
            if torch.equal(attribute(insert.gm, taken).cpu(), order):
                break
            count += 1
            taken = f"{name}_{count}"
        device = x.meta["val"].device
        return insert.call(aten.index_select.default, x, 1, insert.tensor(taken, order.to(device)))


def _moved(insert: Insertion, node: Node, axis: int, to: int) -> Node:
    """Inserts a permutation that puts one axis in another's place and keeps the order of the others."""
    order = list(range(node.meta["val"].dim()))
    order.insert(to, order.pop(axis))
    return insert.call(aten.permute.default, node, order)


def _with_ones(shape: Sequence[Any], rank: int) -> list[Any]:
    return [*[1] * (rank - len(shape)), *shape]


def _channel_axis(numbers: Tensor) -> int | None:
    """Returns the axis along which elements lie beside each other in their source, or else one of size one."""
    axes = list(reversed(range(1, numbers.dim())))
    wide = (axis for axis in axes if numbers.shape[axis] > 1 and _follow_each_other(numbers, axis))
    single = (axis for axis in axes if numbers.shape[axis] == 1)
    return next(wide, next(single, None))


def _follow_each_other(numbers: Tensor, axis: int) -> bool:
    """Returns whether numbers along an axis count up by one, on a line through the middle."""
    line = numbers.movedim(axis, 0).flatten(1)
    return bool((line[:, line.shape[1] // 2].diff() == 1).all())


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_size(value: Node) -> bool:
    return not isinstance(value.meta.get("val"), Tensor | tuple | list)


def _is_fixed(value: Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)
