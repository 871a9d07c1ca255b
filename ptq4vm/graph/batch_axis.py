"""Finds where the images lie in every value of a graph: along an axis of their own, or folded with tokens into one.

An axis of size k · B can be (k, B), (B, k), or B between two factors of k. A value that no view has mixed up is
(outer, B, inner) in row-major order, and a reshape keeps `outer`; all other operators move or keep an axis as a whole,
unless they act along it. So the order follows from the chain of operators, starting at the inputs, whose first axis is
the batch.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ptq4vm.graph.insert import arguments, aten


@dataclass(frozen=True, slots=True)
class BatchAxis:
    """The axis of a value that holds the images: of size before · B · after, in this order."""

    index: int
    before: int = 1
    after: int = 1

    def unfolded(self) -> list[int]:
        """Returns the sizes of the axes that it folds, -1 for the images; none of size one."""
        return [*([self.before] if self.before > 1 else []), -1, *([self.after] if self.after > 1 else [])]


def batch_symbol(graph: Graph) -> Any:
    """Returns the symbol that stands for the number of images in a captured graph; None where no input has any."""
    values = (node.meta.get("val") for node in graph.find_nodes(op="placeholder"))
    sizes: Iterator[Any] = (value.shape[0] for value in values if isinstance(value, Tensor) and value.dim())
    return next((size.node.expr for size in sizes if isinstance(size, torch.SymInt)), None)


def per_image(size: Any, batch: Any) -> int:
    """Returns k for a size of k · B, and 0 for one that is fixed or no multiple of B."""
    if isinstance(size, int) or batch is None:
        return 0
    ratio = size.node.expr / batch
    return int(ratio) if ratio.is_Integer else 0


def batch_axes(graph: Graph) -> dict[Node, BatchAxis]:
    """Returns the axis of the images in each value of a captured graph, but for values in which they are mixed up.

    Behind an operator whose effect on the order is not known, an axis of exactly B entries is taken for the images.
    """
    batch = batch_symbol(graph)
    layouts: dict[Node, _Layout] = {}
    for node in graph.nodes:
        shape = _shape(node)
        if not all(isinstance(size, int) for size in shape):
            sizes = tuple(size if isinstance(size, int) else -per_image(size, batch) for size in shape)
            layouts[node] = _Layout(sizes, _outer(node, sizes, layouts))
    return {node: axis for node, layout in layouts.items() if (axis := layout.axis) is not None}


def _shape(node: Node) -> Any:
    """The shape of a tensor, or of the first part of one that was split."""
    value = node.meta.get("val")
    part = value[0] if isinstance(value, list | tuple) and value else value
    return part.shape if isinstance(part, Tensor) else ()


_Sizes = tuple[int, ...]
"""A shape, -k for a size of k · B, and 0 for any other that is not fixed."""


@dataclass(frozen=True, slots=True)
class _Layout:
    sizes: _Sizes
    outer: int | None
    """Fixed elements before the images, row-major; None where the images are mixed up."""

    @property
    def axis(self) -> BatchAxis | None:
        """The axis that the images are in; None where they are in several."""
        folded = [index for index, size in enumerate(self.sizes) if size <= 0]
        if self.outer is None or len(folded) != 1:
            return None
        (index,) = folded
        ahead, count = math.prod(self.sizes[:index]), -self.sizes[index]
        before = self.outer // ahead if ahead else 0
        fits = before and count and before * ahead == self.outer and count % before == 0
        return BatchAxis(index, before, count // before) if fits else None


def _outer(node: Node, sizes: _Sizes, layouts: dict[Node, _Layout]) -> int | None:
    """Returns the fixed elements before the images in a value, as its operator leaves them."""
    sources = [layouts[source] for source in node.all_input_nodes if source in layouts]
    if node.target in _RESHAPES and sources:
        return sources[0].outer
    if node.target is aten.select_scatter.default:
        sources = sources[:1]  # what is written has an axis less, and takes the order of what it is written into
    folded = [index for index, size in enumerate(sizes) if size <= 0]
    axes = [source.axis for source in sources]
    if len(folded) > 1 or None in axes:
        return None
    (index,) = folded
    kept = {_before(node, axis, -sizes[index]) for axis in axes if axis is not None}
    if len(kept) == 1 and None not in kept:
        return math.prod(sizes[:index]) * kept.pop()  # type: ignore[operator]
    own = sizes[index] == -1 and not any(_acts_along(node, axis) for axis in axes if axis is not None)
    return math.prod(sizes[:index]) if own else None


def _before(node: Node, axis: BatchAxis, count: int) -> int | None:
    """Returns the tokens before the images in an axis of count · B entries that an operator makes from another."""
    whole = count == axis.before * axis.after
    if not _acts_along(node, axis) or (whole and node.target in _SLICES):
        return axis.before if whole else None
    # parts one after another, each of whole batches
    return count if axis.after == 1 and node.target in _PARTS else None


def _acts_along(node: Node, axis: BatchAxis) -> bool:
    """Returns whether an operator selects, joins, sorts or sums along an axis of its input."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target in _MOVES:
        return False
    if target is aten.index.Tensor:
        indices: Any = node.args[1]
        return len(indices) > axis.index and indices[axis.index] is not None
    given = dict(zip((argument.name for argument in target._schema.arguments), arguments(node), strict=True))
    rank = len(_shape(node.all_input_nodes[0]))
    dims = [given[name] for name in ("dim", "dims", "dimension") if given.get(name) is not None]
    flat = itertools.chain.from_iterable(dim if isinstance(dim, list | tuple) else [dim] for dim in dims)
    return any(isinstance(dim, int) and dim % rank == axis.index for dim in flat)


_MOVES = {aten.permute.default, aten.stack.default}
"""Operators whose `dim` is no axis to act along."""

_SLICES = {aten.slice.Tensor, aten.narrow.default, aten.slice_scatter.default}
"""Operators that take or replace a part along an axis, and keep the order of an axis that stays whole."""

_PARTS = {aten.cat.default, aten.chunk.default, aten.split.Tensor}
"""Operators that join values along an axis or divide them into equal parts."""

_RESHAPES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
}
"""Operators that keep the row-major order of elements."""


def depend_on_images(graph: Graph) -> set[Node]:
    """Returns the values that are computed from the inputs, not from their sizes alone."""
    reached = set(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        value = node.meta.get("val")
        number = value is not None and not isinstance(value, Tensor | list | tuple)
        if not number and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached
