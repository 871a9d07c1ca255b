"""Cutting a graph at its blocks, which are calibrated one after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx import GraphModule, Node

from ptq4vm.graph.capture import CaptureError
from ptq4vm.graph.insert import PIECE, aten
from ptq4vm.graph.sites import block_paths
from ptq4vm.graph.views import module_paths, scope

NamedTensors = dict[str, Tensor]
"""Values of a graph by the name of their node; their first axis is the batch."""


@dataclass(frozen=True)
class Block:
    """A piece of a graph that shares parameters and modules with the whole."""

    name: str
    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Tensors with the batch as their first axis that later pieces or the caller of the whole graph read."""
    scalars: tuple[str, ...] = ()
    """Outputs of the whole graph without such an axis, such as a mean over the images."""
    results: tuple[str, ...] = ()
    """The names in `outputs` and `scalars` that the whole graph returns."""

    def __call__(self, values: NamedTensors) -> NamedTensors:
        """Runs the piece on named values; returns `outputs` and `scalars`."""
        results = self.module(*(values[name] for name in self.inputs))
        return dict(zip(self.outputs + self.scalars, results, strict=True))


def partition_blocks(gm: GraphModule, linears: Sequence[Node]) -> list[Block]:
    """Returns pieces whose composition is the graph: what precedes the blocks, each block, what follows.

    `linears` are the nodes to quantize: a block is a numbered module that holds some. What lies between two blocks
    opens the piece of the block that reads it, so that a block's outputs are its own; what only the graph's outputs
    read is in the last piece. Without any numbered module the blocks are those of `ptq4vm.graph.pieces`, or the graph
    is one piece. Raises CaptureError where a value that crosses a border is no tensor with the batch as its first axis.
    """
    order = list(dict.fromkeys(path for path in block_paths(linears) if path is not None))
    rank = {path: i + 1 for i, path in enumerate(order)}
    places = _places(gm, rank)
    count = max(places.values(), default=0) + 1
    names = ["stem", *order, "head"] if order else ["model"]
    output = gm.graph.output_node()
    return [_block(gm, places, index, names[index], output) for index in range(count)]


def _places(gm: GraphModule, rank: dict[str, int]) -> dict[Node, int]:
    """Returns which piece each node that depends on the input belongs to; no node precedes what it reads."""
    body = [node for node in gm.graph.nodes if node.op in ("call_function", "call_module", "call_method")]
    places: dict[Node, int] = {}
    data = set(gm.graph.find_nodes(op="placeholder"))
    outside: list[Node] = []
    for node in body:
        if data.isdisjoint(node.all_input_nodes):
            continue
        data.add(node)
        own = _own_rank(node, rank)
        reached = max((places[source] for source in node.all_input_nodes if source in places), default=0)
        places[node] = max(own or 0, reached)
        # what is in no block goes to its first reader; from the stem only observers do, which carry no module path
        if own is None and (reached or not node.meta.get("nn_module_stack")):
            outside.append(node)
    head = len(rank) + 1
    for node in reversed(outside):
        users = [places[user] for user in node.users if user in places]
        if users or places[node]:
            places[node] = min(users, default=head)
    return places


def _own_rank(node: Node, rank: dict[str, int]) -> int | None:
    names = [*module_paths(node), node.meta.get(PIECE)]
    return next((rank[name] for name in reversed(names) if name in rank), None)


def _block(gm: GraphModule, places: dict[Node, int], index: int, name: str, output: Node) -> Block:
    body = [node for node in gm.graph.nodes if places.get(node) == index]
    images = {str(_batch(node)) for node in gm.graph.find_nodes(op="placeholder")}
    results = set(output.all_input_nodes)
    inputs = _inputs(body, places, images)
    graph, copies = _copied(body, places, inputs)
    outputs, scalars = _outputs(body, places, results, images)
    graph.output(tuple(copies[node] for node in (*outputs, *scalars)))
    graph.lint()
    return Block(
        name,
        fx.GraphModule(gm, graph, f"{type(gm).__name__}_{index}"),
        inputs=tuple(node.name for node in inputs),
        outputs=tuple(node.name for node in outputs),
        scalars=tuple(node.name for node in scalars),
        results=tuple(node.name for node in (*outputs, *scalars) if node in results),
    )


def _inputs(body: Sequence[Node], places: dict[Node, int], images: set[str]) -> list[Node]:
    """Returns the tensors that a piece reads and that depend on the input; each has the batch as its first axis."""
    inside = set(body)
    sources = dict.fromkeys(source for node in body for source in node.all_input_nodes if source not in inside)
    tensors = [node for node in sources if (node.op == "placeholder" or node in places) and _is_tensor(node)]
    for node in tensors:
        if str(_batch(node)) not in images:
            raise _misfit(node)
    return tensors


def _copied(body: Sequence[Node], places: dict[Node, int], inputs: Sequence[Node]) -> tuple[fx.Graph, dict[Node, Node]]:
    """Copies a piece into a graph of its own, with all that it reads and that depends on parameters or sizes alone."""
    graph, inside = fx.Graph(), set(body)
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)

    def copied(node: Node) -> Node:
        if node not in copies:
            source = _sized(node, inputs) if node not in inside and node in places else None
            if source is None:
                copies[node] = graph.node_copy(node, copied)
            else:
                copies[node] = graph.call_function(aten.sym_size.int, (copies[source], 0))
        return copies[node]

    for node in body:
        copied(node)
    return graph, copies


def _outputs(
    body: Sequence[Node], places: dict[Node, int], results: set[Node], images: set[str]
) -> tuple[list[Node], list[Node]]:
    """Returns the tensors of a piece that others read or learning compares, and its results without a batch."""
    inside = set(body)
    scalars = [node for node in body if node in results and _is_tensor(node) and str(_batch(node)) not in images]
    # what learning can compare where an output itself has no batch or no gradient
    idle = [node for node in body if node in results and (node in scalars or not _is_float(node))]
    wanted = results | {source for node in idle for source in _with_batch(node, inside, images)}
    wanted |= {node for node in body if any(user in places and user not in inside for user in node.users)}
    return [node for node in body if node in wanted and _is_tensor(node) and node not in scalars], scalars


def _with_batch(node: Node, inside: set[Node], images: set[str]) -> set[Node]:
    """Returns the nearest floating-point values of a piece, the batch first, that one of it is computed from."""
    found: set[Node] = set()
    for source in node.all_input_nodes:
        if source in inside:
            batched = str(_batch(source)) in images and _is_float(source)
            found |= {source} if batched else _with_batch(source, inside, images)
    return found


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_float(node: Node) -> bool:
    return _is_tensor(node) and node.meta["val"].is_floating_point()


def _batch(node: Node) -> Any:
    """Returns the size of a tensor's first axis."""
    return node.meta["val"].shape[0] if _is_tensor(node) and node.meta["val"].dim() else None


def _sized(size: Node, tensors: Sequence[Node]) -> Node | None:
    """Returns a tensor whose first axis has the size that a node holds, so that pieces run on any batch.

    None where the size is computed from others.
    """
    for node in tensors:
        if str(_batch(node)) == str(size.meta.get("val")):
            return node
    if any(_is_tensor(node) for node in size.all_input_nodes):
        raise _misfit(size)
    return None


def _misfit(node: Node) -> CaptureError:
    value = node.meta.get("val")
    kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"the value {value}"
    return CaptureError(
        f"{node.name} (in {scope(node) or 'the model'}) crosses the border of a block and is {kind}: blocks hand on "
        "tensors whose first axis is the batch, and sizes of it; permute or reshape this one inside the block"
    )
