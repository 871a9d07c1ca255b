"""What crosses the borders of blocks: tensors arranged with the batch first. Constants and sizes are computed anew.

Shapes: B images. An axis of a tensor is all images, or holds them with tokens, as windows (B·nW, …) do.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from ptq4vm.graph.batch_axis import BatchAxis, batch_axes
from ptq4vm.graph.capture_errors import CaptureError
from ptq4vm.graph.insert import aten
from ptq4vm.graph.user_code import recorded_line
from ptq4vm.graph.views import scope

_SIZES_ONLY: dict[Any, int] = {
    **dict.fromkeys((aten.type_as.default, aten.expand_as.default, aten.view_as.default, aten.reshape_as.default), 1),
    aten.to.other: 1,
    **dict.fromkeys((aten.zeros_like.default, aten.ones_like.default, aten.full_like.default), 0),
    **dict.fromkeys((aten.empty_like.default, aten.new_empty.default, aten.new_full.default), 0),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default), 0),
    **dict.fromkeys((aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default), 0),
}
"""Operators that read sizes, type and device of an argument and none of its numbers, with its position."""


FIRST = BatchAxis(0)


def images_first(graph: fx.Graph, value: Node, axis: BatchAxis) -> Node:
    """Returns a tensor with the batch, which is in another axis, as its first one."""
    sizes, batch = axis.unfolded(), axis.index + (axis.before > 1)
    if len(sizes) > 1:
        value = _view(graph, aten.unflatten.int, value, axis.index, sizes)
    return _view(graph, aten.movedim.int, value, batch, 0) if batch else value


def images_back(graph: fx.Graph, value: Node, axis: BatchAxis) -> Node:
    """Returns a tensor as it was before `images_first`."""
    sizes, batch = axis.unfolded(), axis.index + (axis.before > 1)
    if batch:
        value = _view(graph, aten.movedim.int, value, 0, batch)
    if len(sizes) > 1:
        value = _view(graph, aten.flatten.using_ints, value, axis.index, axis.index + len(sizes) - 1)
    return value


class Borders:
    """The values of a graph that a block can read from another one."""

    def __init__(self, gm: GraphModule) -> None:
        self._graph = gm.graph
        self._images = list(gm.graph.find_nodes(op="placeholder"))
        self._batches = {expression(_size(node, 0)) for node in self._images} - {None}
        self._data = set(self._images)
        for node in gm.graph.nodes:
            if not self._data.isdisjoint(value_reads(node)):
                self._data.add(node)

    def is_data(self, node: Node) -> bool:
        """Returns whether a value depends on the numbers in the inputs, not on their sizes, types and devices alone."""
        return node in self._data

    def is_batched(self, node: Node) -> bool:
        """Returns whether a node is a tensor with the batch as its first axis."""
        return expression(_size(node, 0)) in self._batches

    def with_batch(self) -> Node:
        """Returns an input of the model, for a piece that needs nothing but its batch."""
        return next(node for node in self._images if self.is_batched(node))

    def axis(self, node: Node) -> BatchAxis:
        """Returns where a tensor has its images; raises CaptureError, which names it, where no axis holds them."""
        if self.is_batched(node):
            return FIRST
        if (axis := self._axes.get(node)) is not None:
            return axis
        raise misfit(node)

    @functools.cached_property
    def _axes(self) -> dict[Node, BatchAxis]:
        return batch_axes(self._graph)


def value_reads(node: Node) -> list[Node]:
    """Returns the nodes whose numbers a node reads."""
    position = _SIZES_ONLY.get(node.target) if node.op == "call_function" else None
    if position is None:
        return node.all_input_nodes
    others = [value for i, value in enumerate(node.args) if i != position]
    found: list[Node] = []
    fx.map_arg((others, node.kwargs), found.append)
    return found


class Piece:
    """The graph of one block while it is made."""

    def __init__(self, borders: Borders, inputs: Sequence[Node]) -> None:
        self.graph = fx.Graph()
        self.names: list[str] = []
        self._borders = borders
        self._copies: dict[Node, Node] = {}
        self._inputs = [self._input(node) for node in inputs]

    def _input(self, node: Node) -> Node:
        axis = self._borders.axis(node)
        made = self.graph.placeholder(name_at_borders(node, axis))
        made.meta.update(node.meta if axis == FIRST else {"val": _value_images_first(node, axis)})
        self.names.append(made.name)
        self._copies[node] = images_back(self.graph, made, axis)
        return made

    def copy(self, node: Node, inside: set[Node]) -> Node:
        """Copies a node of the whole graph, and before it all it reads that depends on parameters or sizes alone."""
        if node not in self._copies:
            self._copies[node] = self._copied(node, inside)
        return self._copies[node]

    def _copied(self, node: Node, inside: set[Node]) -> Node:
        if self._borders.is_data(node) and node not in inside:
            return self._empty(node)
        if node.target is aten.sym_size.int and node.args[0] not in inside | self._copies.keys():
            return self._sized(node.meta["val"], node)
        return self.graph.node_copy(node, lambda source: self.copy(source, inside))

    def _empty(self, node: Node) -> Node:
        """Returns a tensor of the sizes and type of one of another block, of which nothing else is read."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise misfit(node)
        sizes = [self._sized(size, node) for size in value.shape]
        made = self.graph.call_function(aten.new_empty.default, (self._inputs[0], sizes), {"dtype": value.dtype})
        made.meta["val"] = value
        return made

    def _sized(self, size: Any, node: Node) -> Any:
        """Returns a size, computed from this block's batch, so that pieces run on any."""
        return size if isinstance(size, int) else self._computed(expression(size), node)

    def _computed(self, value: Any, node: Node) -> Any:
        if value.is_Integer:
            return int(value)
        if value in self._borders._batches:
            return self.graph.call_function(aten.sym_size.int, (self._inputs[0], 0))
        if not (value.is_Mul or value.is_Add):
            raise misfit(node)
        combine = operator.mul if value.is_Mul else operator.add
        first, *rest = (self._computed(part, node) for part in value.args)
        for part in rest:
            first = self.graph.call_function(combine, (first, part))
        return first

    def output(self, node: Node, axis: BatchAxis) -> Node:
        """Returns a value that the piece hands on, with the batch first."""
        return images_first(self.graph, self._copies[node], axis)


def name_at_borders(node: Node, axis: BatchAxis) -> str:
    """Returns the name under which blocks hand on a tensor."""
    return node.name if axis == FIRST else f"{node.name}_by_image"


def _value_images_first(node: Node, axis: BatchAxis) -> Any:
    """Returns the type and shape of a tensor with the batch first."""
    graph = fx.Graph()
    made = graph.placeholder("x")
    made.meta["val"] = node.meta["val"]
    return images_first(graph, made, axis).meta["val"]


def _view(graph: fx.Graph, target: Any, value: Node, *args: Any) -> Node:
    made = graph.call_function(target, (value, *args))
    fake = value.meta["val"]
    with fake.fake_mode, torch.no_grad():
        made.meta["val"] = target(fake, *args)
    return made


def expression(size: Any) -> Any:
    """Returns a size as an expression of sympy; None for a number."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _size(node: Node, axis: int) -> Any:
    value = node.meta.get("val")
    return value.shape[axis] if isinstance(value, Tensor) and value.dim() else None


def misfit(node: Node) -> CaptureError:
    """Returns what to raise for a value that no block can hand on."""
    value = node.meta.get("val")
    kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"the value {value}"
    return CaptureError(
        f"{node.name} (in {scope(node) or 'the model'}{recorded_line(node)}) crosses the border of a block and is "
        f"{kind}: blocks hand on tensors with an axis of images, or of images and tokens in one known order, and sizes "
        "of the batch; compute this one inside the block that reads it, or keep the images apart"
    )
