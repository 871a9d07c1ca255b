"""A product of a weight with the tokens of images, by letters for its axes, and the linears that compute it.

Shapes: B images (dynamic), L or H × W tokens, D channels in, N out, K weights or groups. A product with K weights
becomes K linears on (B, L, D).
"""

import dataclasses
import operator
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ptq4vm.graph.batch_axis import BatchAxis
from ptq4vm.graph.insert import Insertion, aten
from ptq4vm.graph.views import elements_of, is_repetition, root_of, shows_elements

NO_BIAS = "it adds something else than a bias (N,) to x · W"

_Lettered = tuple[Node, str]
"""A value with a letter for each axis."""

_Operands = tuple[_Lettered, _Lettered, _Lettered | None]
"""x, weight, and bias if there is one."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A value and its axes: a letter each, or the letters that an axis folds, such as `KD` for K groups of channels."""

    node: Node
    axes: Sequence[str]
    dropped: str = ""
    """Letters of axes along which it does not change, and which the product does not read."""

    @property
    def letters(self) -> str:
        return "".join(letter for letter in "".join(self.axes) if letter not in self.dropped)

    def sizes(self, folds: Mapping[str, int]) -> dict[str, Any]:
        """Returns the size of every axis by its letter."""
        shape = self.node.meta["val"].shape
        own = {axis: size for axis, size in zip(self.axes, shape, strict=True) if len(axis) == 1}
        return own | {letter: folds[letter] for axis in self.axes if len(axis) > 1 for letter in axis}

    def without(self, letters: str) -> "Operand":
        return dataclasses.replace(self, dropped=self.dropped + letters)

    def unfolded(self, insert: Insertion, folds: Mapping[str, int]) -> _Lettered:
        """Returns the value with an axis for each letter, without those dropped, and its letters."""
        node = self.node
        for index, axis in reversed([*enumerate(self.axes)]):
            if len(axis) > 1:
                node = insert.call(aten.unflatten.int, node, index, [folds[letter] for letter in axis])
        letters = "".join(self.axes)
        for index, letter in reversed([*enumerate(letters)]):
            if letter in self.dropped:
                node = insert.call(aten.select.int, node, index, 0)
        return node, self.letters


@dataclass(frozen=True, slots=True)
class Product:
    """A product of x with a weight: letters in both and not in the result are summed."""

    x: Operand
    weight: Operand
    out: Sequence[str]
    bias: Operand | None = None
    folds: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the letters of folded axes; -1 for the images."""
    images: str = ""
    """The letter of the images, once it is known."""
    lifted: bool = False
    """Whether one value per image becomes a token."""

    @property
    def result(self) -> str:
        return "".join(self.out)

    @property
    def inner(self) -> str:
        """Channels in: what is summed."""
        return "".join(a for a in self.weight.letters if a in self.x.letters and a not in self.result)

    @property
    def group(self) -> str:
        """Axes of K, along which both change."""
        return "".join(a for a in self.weight.letters if a in self.x.letters and a in self.result)

    @property
    def new(self) -> str:
        """Channels out."""
        return "".join(a for a in self.weight.letters if a not in self.x.letters)

    @property
    def tokens(self) -> str:
        return "".join(a for a in self.x.letters if a not in self.weight.letters + self.images)

    def shared(self) -> "Product":
        """Returns it without the axes along which one of its operands does not change: those are no axes of K."""
        x, weight = self.x.sizes(self.folds), self.weight.sizes(self.folds)
        one = [a for a in _constant_axes(self.weight) if _is_needless(weight[a], x.get(a), a in self.result)]
        wide = [a for a in weight if a in x and a not in one and x[a] == 1 != weight[a]]
        return dataclasses.replace(self, x=self.x.without("".join(wide)), weight=self.weight.without("".join(one)))

    def obstacle(self) -> str | None:
        """Why linears cannot compute it, whatever its tokens are."""
        named = (self.x.letters, self.weight.letters, self.result)
        if any(len({*letters}) < len(letters) for letters in named):
            return "it is more than a sum over channels"
        if {*self.result} != {*self.x.letters, *self.weight.letters} - {*self.inner}:
            return "it is more than a sum over channels"
        if not self.inner or not self.new:
            return "its weight is not a row of matrices (K, N, D)"
        if self.bias is not None and not {*self.new} <= {*self.bias.letters} <= {*self.new, *self.group}:
            return NO_BIAS
        x, weight = self.x.sizes(self.folds), self.weight.sizes(self.folds)
        same = all(x[letter] == weight[letter] for letter in self.inner + self.group)
        return None if same else "it expands an axis of size one"

    def on(self, batch: BatchAxis) -> "Product | str":
        """Returns it with the axis of the images apart from the tokens; or why there is none."""
        axis = self.x.axes[batch.index]
        if len(axis) > 1 or axis in self.weight.letters:
            return "its weight changes from image to image"
        sizes, used = batch.unfolded(), "".join((*self.x.axes, *self.weight.axes))
        free = (letter for letter in string.ascii_letters if letter not in used)
        letters = axis if len(sizes) == 1 else "".join(letter for letter, _ in zip(free, sizes, strict=False))
        x = dataclasses.replace(self.x, axes=[letters if a == axis else a for a in self.x.axes])
        out = [axes.replace(axis, letters) for axes in self.out]
        folds = {**self.folds} if len(sizes) == 1 else {**self.folds, **dict(zip(letters, sizes, strict=True))}
        return dataclasses.replace(self, x=x, out=out, folds=folds, images=letters[sizes.index(-1)])

    @property
    def pooled(self) -> bool:
        """Whether it has one value per image, and no tokens."""
        sizes = self.x.sizes(self.folds)
        return all(sizes[letter] == 1 for letter in self.tokens)

    @property
    def canonical(self) -> bool:
        """Whether one linear reads x (B, L, D) or (B, D) as it is."""
        rows = self.images + self.tokens
        as_it_is = [*self.x.axes] == [*rows, self.inner] and [*self.out] == [*rows, self.new] and not self.x.dropped
        return as_it_is and len(rows) <= 2

    def as_linears(self, insert: Insertion) -> Node:
        """Returns its result in its axes, made by linears on (B, L, D) or, without tokens, on (B, D)."""
        x, weight = (operand.unfolded(insert, self.folds) for operand in (self.x, self.weight))
        bias = None if self.bias is None else self.bias.unfolded(insert, self.folds)
        node = self._grouped(insert, (x, weight, bias), self.group, self.result)
        for index, axis in enumerate(self.out):
            if len(axis) > 1:
                node = insert.call(aten.flatten.using_ints, node, index, index + len(axis) - 1)
        return node

    def _grouped(self, insert: Insertion, operands: _Operands, group: str, result: str) -> Node:
        """Makes one linear for each index of the axes of K."""
        if not group:
            return self._linear(insert, *operands, result)
        axis, (weight, letters) = group[0], operands[1]
        count = weight.meta["val"].shape[letters.index(axis)]

        def parts(operand: _Lettered | None) -> Sequence[Any]:
            if operand is None or axis not in operand[1]:
                return [operand] * count
            whole = insert.call(aten.unbind.int, operand[0], operand[1].index(axis))
            return [(insert.call(operator.getitem, whole, k), operand[1].replace(axis, "")) for k in range(count)]

        rest, each = result.replace(axis, ""), zip(*map(parts, operands), strict=True)
        results = [self._grouped(insert, some, group[1:], rest) for some in each]
        return insert.call(aten.stack.default, results, result.index(axis))

    def _linear(
        self, insert: Insertion, operand: _Lettered, matrix: _Lettered, bias: _Lettered | None, result: str
    ) -> Node:
        inner, new, rows = self.inner, self.new, self.images + self.tokens
        x = _merged(insert, arranged(insert, *operand, rows + inner), len(rows), len(inner))
        tokens = x.meta["val"].shape[1 : len(rows)]
        x = _merged(insert, x, 1, len(tokens))
        if self.lifted and not tokens:
            x = insert.call(aten.unsqueeze.default, x, 1)
        weight = arranged(insert, *matrix, new + inner)
        widths = weight.meta["val"].shape[: len(new)]
        weight = _merged(insert, _merged(insert, weight, len(new), len(inner)), 0, len(new))
        operands = [x, weight]
        if bias is not None:
            operands += [_merged(insert, arranged(insert, *bias, new), 0, len(new))]
        node = insert.call(aten.linear.default, *operands)
        if len(tokens) > 1:
            node = insert.call(aten.unflatten.int, node, 1, [*tokens])
        elif self.lifted and not tokens:
            node = insert.call(aten.squeeze.dim, node, 1)
        if len(new) > 1:
            node = insert.call(aten.unflatten.int, node, -1, [*widths])
        return arranged(insert, node, rows + new, result)


def _merged(insert: Insertion, node: Node, start: int, count: int) -> Node:
    """Folds some axes into one."""
    return node if count < 2 else insert.call(aten.flatten.using_ints, node, start, start + count - 1)


def arranged(insert: Insertion, node: Node, have: Sequence[Any], want: Sequence[Any]) -> Node:
    """Returns a value whose axes stand in another order."""
    order = [have.index(axis) for axis in want]
    return node if order == sorted(order) else insert.call(aten.permute.default, node, order)


def _is_needless(weight: Any, x: Any, in_result: bool) -> bool:
    """Returns whether an axis along which the weight does not change can go, by its size there and in x, if it is."""
    if x is None:
        return not in_result and weight == 1
    return in_result and (x != 1 or weight == 1)


def _constant_axes(weight: Operand) -> str:
    """Returns the letters of the axes along which a view of a parameter does not change."""
    shape = weight.node.meta["val"].shape
    letters = [axis for axis, size in zip(weight.axes, shape, strict=True) if size == 1]
    if _repeats(weight.node):
        count = root_of(weight.node).meta["val"].numel()
        shape = root_of(weight.node).meta["val"].shape
        elements = elements_of(weight.node, torch.arange(count).view(shape))
        same = [bool((elements == elements.narrow(index, 0, 1)).all()) for index in range(elements.dim())]
        letters = [axis for axis, constant in zip(weight.axes, same, strict=True) if constant]
    return "".join(axis for axis in letters if len(axis) == 1)


def _repeats(view: Any) -> bool:
    return shows_elements(view) and (is_repetition(view) or _repeats(view.args[0]))
