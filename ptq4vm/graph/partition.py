"""Cutting a graph at its blocks, which are calibrated one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx
from torch.fx import GraphModule, Node

from ptq4vm.graph.borders import Borders, Piece, misfit, name_at_borders, value_reads
from ptq4vm.graph.insert import PIECE
from ptq4vm.graph.sites import block_paths
from ptq4vm.graph.views import module_paths

NamedTensors = dict[str, Tensor]
"""Values of a graph by the name of their node; their first axis is the batch."""


@dataclass(frozen=True)
class Block:
    """A piece of a graph that shares parameters and modules with the whole."""

    name: str
    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Tensors that later pieces or the caller of the whole graph read, arranged with the batch as their first axis."""
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
    is one piece. Raises CaptureError where a value that crosses a border has no axis of images.
    """
    return [
        Block(name, fx.GraphModule(gm, graph, f"{type(gm).__name__}_{index}"), **names)
        for index, (name, graph, names) in enumerate(_pieces(gm, linears))
    ]


def check_borders(gm: GraphModule, linears: Sequence[Node]) -> None:
    """Raises what `partition_blocks` would, at less cost."""
    for _ in _pieces(gm, linears):
        pass


def _pieces(gm: GraphModule, linears: Sequence[Node]) -> Iterator[tuple[str, fx.Graph, dict[str, tuple[str, ...]]]]:
    """Yields the name, the graph, and the names of inputs and outputs of every piece."""
    order = list(dict.fromkeys(path for path in block_paths(linears) if path is not None))
    rank = {path: i + 1 for i, path in enumerate(order)}
    places = _places(gm, rank)
    count = max(places.values(), default=0) + 1
    names = ["stem", *order, "head"] if order else ["model"]
    borders = Borders(gm)
    bodies = [[node for node in gm.graph.nodes if places.get(node) == index] for index in range(count)]
    inputs = [_inputs(body, places, borders) for body in bodies]
    handed_on = {node for nodes in inputs for node in nodes}
    results = set(gm.graph.output_node().all_input_nodes)
    for name, body, read in zip(names, bodies, inputs, strict=False):
        yield name, *_piece(body, read, handed_on, results, borders)


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


def _piece(
    body: Sequence[Node], inputs: Sequence[Node], handed_on: set[Node], results: set[Node], borders: Borders
) -> tuple[fx.Graph, dict[str, tuple[str, ...]]]:
    """Copies a piece into a graph of its own, with all that it reads and that depends on parameters or sizes alone."""
    outputs, scalars = _outputs(body, handed_on, results, borders)
    piece, inside = Piece(borders, inputs), set(body)
    for node in body:
        if borders.is_data(node) or node in results:
            piece.copy(node, inside)
    axes = [borders.axis(node) for node in outputs]
    made = [piece.output(node, axis) for node, axis in zip(outputs, axes, strict=True)]
    piece.graph.output((*made, *(piece.copy(node, inside) for node in scalars)))
    piece.graph.lint()
    returned = [node for node in outputs if node in results and node not in scalars]
    return piece.graph, {
        "inputs": tuple(piece.names),
        "outputs": tuple(name_at_borders(node, axis) for node, axis in zip(outputs, axes, strict=True)),
        "scalars": tuple(node.name for node in scalars),
        "results": tuple(node.name for node in (*returned, *scalars)),
    }


def _inputs(body: Sequence[Node], places: dict[Node, int], borders: Borders) -> list[Node]:
    """Returns the tensors that a piece reads and whose numbers depend on the input, or one that tells the batch."""
    inside = set(body)
    data = [node for node in body if borders.is_data(node)]
    sources = dict.fromkeys(source for node in data for source in value_reads(node) if source not in inside)
    tensors = [node for node in sources if borders.is_data(node)]
    for node in tensors:
        if not _is_tensor(node):
            raise misfit(node)
    return tensors or [borders.with_batch()]


def _outputs(
    body: Sequence[Node], handed_on: set[Node], results: set[Node], borders: Borders
) -> tuple[list[Node], list[Node]]:
    """Returns the tensors of a piece that others read or learning compares, and its results without a batch."""
    inside = set(body)
    scalars = [node for node in body if node in results and _is_tensor(node) and not borders.is_batched(node)]
    # what learning can compare where an output itself has no batch or no gradient
    idle = [node for node in body if node in results and (node in scalars or not _is_float(node))]
    wanted = results | {source for node in idle for source in _with_batch(node, inside, borders)}
    kept = [node for node in body if node in wanted and _is_tensor(node) and node not in scalars]
    return [node for node in body if node in handed_on or node in kept], scalars


def _with_batch(node: Node, inside: set[Node], borders: Borders) -> set[Node]:
    """Returns the nearest floating-point values of a piece, the batch first, that one of it is computed from."""
    found: set[Node] = set()
    for source in node.all_input_nodes:
        if source in inside:
            batched = borders.is_batched(source) and _is_float(source)
            found |= {source} if batched else _with_batch(source, inside, borders)
    return found


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_float(node: Node) -> bool:
    return _is_tensor(node) and node.meta["val"].is_floating_point()
