"""Finds where the elements of a value come from, by running on numbers what only moves elements."""

import bisect
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from ptq4vm.graph.insert import aten
from ptq4vm.graph.views import constant_of, indices_of, is_view

IMAGES = 2
"""Batch of the numbers: whatever maps two images apart from each other maps any number of them so."""

MOST_PARTS = 16
"""Values in a stack that is worth to be taken apart."""

_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_ZEROS = (aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default)
_OTHERS = {
    *_PADS,
    *_ZEROS,
    aten._unsafe_view.default,
    aten.cat.default,
    aten.concat.default,
    aten.concatenate.default,
    aten.copy.default,
    aten.dstack.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.flip.default,
    aten.fliplr.default,
    aten.flipud.default,
    aten.hstack.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.reshape_as.default,
    aten.roll.default,
    aten.rot90.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.stack.default,
    aten.tensor_split.indices,
    aten.tile.default,
    aten.view_as.default,
    aten.vstack.default,
}


def moves_elements(node: Any) -> bool:
    """Returns whether a node selects, arranges, joins or pads with zeros what its arguments hold."""
    if is_view(node):
        return node.target is not operator.getitem or moves_elements(node.args[0])
    if not isinstance(node, Node) or node.target not in _OTHERS:
        return False
    if node.target in _PADS:
        # x, sizes, then the mode (of pad) and the value
        return all(argument in ("constant", None, 0, 0.0) for argument in node.args[2:])
    return True


def moved_value(node: Any) -> Node | None:
    """Returns the one tensor whose elements a node arranges; None where it joins several or computes."""
    tensors = [value for value in node.all_input_nodes if isinstance(value.meta.get("val"), Tensor | tuple | list)]
    data = [value for value in tensors if value not in indices_of(node)] if moves_elements(node) else []
    return data[0] if len(data) == 1 else None


_UNKNOWN = object()


class ElementNumbers:
    """Numbers of the elements of every value of a graph, of `IMAGES` images; 0 for zeros of a padding.

    Sources, which are values that are computed, number their elements on from each other's last in row-major order. A
    graph that was traced for a fixed batch is read as if it were for `IMAGES` images.
    """

    def __init__(self, *sources: Node | None) -> None:
        self._stops = set(sources)
        self._values: dict[Node, Any] = {}
        self._sources: list[Node] = []
        self._starts: list[int] = []
        self._places: dict[Node, int] = {}
        self._end = 1
        self._batch: Any = _UNKNOWN
        self._data: dict[Node, bool] = {}

    def stop_at(self, node: Node) -> None:
        """Makes a value a source that only moves others' elements."""
        self._stops.add(node)

    def of(self, node: Node) -> Tensor | None:
        """Returns the numbers of a value, in its shape; None where they depend on more than the batch."""
        if self._batch is _UNKNOWN:
            self._batch = fixed_batch(node.graph)
        try:
            value = self._value(node)
        except (RuntimeError, KeyError, IndexError, TypeError, ValueError, NotImplementedError):
            value = None
        return value if isinstance(value, Tensor) else None

    def is_data(self, node: Node) -> bool:
        """Returns whether a value is computed from the inputs."""
        waiting = [node]
        while waiting:  # no recursion, which deep graphs would exhaust
            each = waiting[-1]
            unknown = [source for source in each.all_input_nodes if source not in self._data]
            if each in self._data or not unknown:
                waiting.pop()
                inputs = (self._data[source] for source in each.all_input_nodes)
                self._data.setdefault(each, each.op == "placeholder" or any(inputs))
            waiting += unknown if each not in self._data else []
        return self._data[node]

    def source(self, numbers: Tensor) -> Node | None:
        """Returns the source that all numbers but zeros are of; None where there are several, or none."""
        largest = int(numbers.max()) if numbers.numel() else 0
        place = bisect.bisect_right(self._starts, largest) - 1
        if place < 0:
            return None
        smallest = int(numbers.min())
        if smallest == 0:
            smallest = int(numbers.masked_fill(numbers == 0, largest).min())
        return self._sources[place] if smallest >= self._starts[place] else None

    def is_stacked(self, numbers: Tensor, axis: int) -> bool:
        """Returns whether every part of a value along an axis, of which there are a few, has one source."""
        return 1 < numbers.shape[axis] <= MOST_PARTS and all(
            self.source(part) is not None for part in numbers.unbind(axis)
        )

    def start(self, source: Node) -> int:
        """Returns the number of a source's first element."""
        return self._starts[self._places[source]]

    def count(self, source: Node) -> int:
        """Returns how many elements an image of a source has."""
        place = self._places[source] + 1
        end = self._starts[place] if place < len(self._starts) else self._end
        return (end - self.start(source)) // IMAGES

    def forget(self, node: Node) -> None:
        """Frees the numbers of a value; they are made again, the same, where they are asked for."""
        self._values.pop(node, None)

    def _value(self, node: Node) -> Any:
        if node not in self._values:
            self._values[node] = self._made(node)
        return self._values[node]

    def _made(self, node: Node) -> Any:
        recorded = node.meta.get("val")
        if not isinstance(recorded, Tensor | tuple | list):
            return _size(recorded)
        source = node in self._stops or not moves_elements(node)
        if source or node.target in _ZEROS:
            if not isinstance(recorded, Tensor):
                raise TypeError(f"{node.name} is several tensors")
            sizes = self._sizes(node)
            return self._numbered(node, sizes) if source else torch.zeros(sizes, dtype=torch.int64)
        if self._batch is not None and node.target in _SIZED:  # sizes of the fixed batch are among its arguments
            read: Any = self._value(node.args[0])  # type: ignore[arg-type]
            return read.expand(self._sizes(node)) if node.target in _EXPANDS else read.reshape(self._sizes(node))
        fixed = {value: constant_of(value) for value in indices_of(node)}
        values = {
            value: self._value(value) if fixed.get(value) is None else fixed[value] for value in node.all_input_nodes
        }
        arguments, options = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        return node.target(*arguments, **options)  # type: ignore[operator]

    def _sizes(self, node: Node) -> list[int]:
        """Returns the shape of a value for `IMAGES` images."""
        sizes = [_size(size) for size in node.meta["val"].shape]
        if self._batch is not None and sizes and sizes[0] % self._batch == 0 and self.is_data(node):
            sizes[0] = sizes[0] // self._batch * IMAGES
        return sizes

    def _numbered(self, node: Node, sizes: list[int]) -> Tensor:
        count = math.prod(sizes)
        if node not in self._places:
            self._places[node] = len(self._sources)
            self._sources.append(node)
            self._starts.append(self._end)
            self._end += count
        start = self.start(node)
        return torch.arange(start, start + count).view(sizes)


_EXPANDS = {aten.expand.default, aten.expand_as.default}
_SIZED = _EXPANDS | {
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.unflatten.int,
    aten.view.default,
}


def fixed_batch(graph: fx.Graph) -> int | None:
    """Returns the batch of a graph that was traced for a fixed one; None of any other."""
    values = (node.meta.get("val") for node in graph.find_nodes(op="placeholder"))
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
    return sizes[0] if sizes and all(isinstance(size, int) and size > 0 for size in sizes) else None


def _size(value: Any) -> Any:
    """Returns a size for `IMAGES` images."""
    if isinstance(value, int | float) or not isinstance(value, torch.SymInt | torch.SymFloat):
        return value
    expression = value.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, IMAGES)))
