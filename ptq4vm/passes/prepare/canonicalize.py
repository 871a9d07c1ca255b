"""Every product of a weight with tokens becomes `aten.linear` of a 2-D parameter on (B, L, D): one form for all passes.

Shapes: B images (dynamic), L or H × W tokens, D channels in, N out, K weights or groups. A product with K weights
becomes K linears.
"""

import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from ptq4vm.graph.insert import Insertion, arguments, aten
from ptq4vm.graph.pipeline import Pipeline
from ptq4vm.graph.sites import on_tokens
from ptq4vm.graph.verify import GraphStage
from ptq4vm.graph.views import parameter_of, scope
from ptq4vm.passes.prepare.own_weights import own_weights, unshare_weights

logger = logging.getLogger(__name__)

_NO_TOKENS = "its input has no tokens beside the batch"
_NO_BATCH = "the first axis of its input is not the batch"


def matmul_to_linear(gm: GraphModule) -> GraphModule:
    """`x @ W`, `W @ x` and `addmm(b, x, W)`."""
    for node in _calls(gm, aten.matmul.default, aten.mm.default, aten.bmm.default, *_SUMS):
        bias, left, right = node.args if node.target in _SUMS else (None, *node.args)
        if _is_weight(left) == _is_weight(right) or 1 in (_rank(left), _rank(right)):
            continue
        if bias is not None and (node.kwargs or _is_weight(left) or [*_sizes(bias)] != [*_sizes(right)[1:]]):
            _leave(node, "it adds something else than a bias (N,) to x · W")
            continue
        extra = _rank(left) - _rank(right)
        batch = string.ascii_lowercase[: max(_rank(left), _rank(right)) - 2]
        axes = batch[max(-extra, 0) :] + "MD", batch[max(extra, 0) :] + "DN", batch + "MN"
        _rewrite(gm, node, left, right, axes, bias)
    return gm


_SUMS = (aten.addmm.default, aten.baddbmm.default)


def einsum_to_linear(gm: GraphModule) -> GraphModule:
    """`b l d, n d -> b l n` and, with K weights, `b k d l, k n d -> b k n l`; an ellipsis may stand for axes."""
    for node in _calls(gm, aten.einsum.default):
        equation, operands = node.args[:2]
        weights = [operand for operand in operands if _is_weight(operand)]
        if not weights or len(weights) == len(operands):
            continue
        if len(operands) != 2 or "->" not in equation:
            _leave(node, f"the equation {equation!r} is not of the form 'x, w -> y'")
            continue
        left, right = operands
        _rewrite(gm, node, left, right, _einsum_axes(equation, (_rank(left), _rank(right))))
    return gm


def _einsum_axes(equation: str, ranks: Sequence[int]) -> tuple[str, str, str]:
    """Letters that the equation leaves free stand for its ellipsis."""
    inputs, out = equation.replace(" ", "").split("->")
    named = inputs.split(",")
    hidden = [rank - len(axes.replace("...", "")) for axes, rank in zip(named, ranks, strict=True)]
    free = "".join(sorted({*string.ascii_letters} - {*equation}))[: max(hidden)]
    left, right = (axes.replace("...", free[len(free) - n :]) for axes, n in zip(named, hidden, strict=True))
    return left, right, out.replace("...", free)


def conv_to_linear(gm: GraphModule) -> GraphModule:
    """1×1 convolutions of (B, D, L) or (B, D, H, W), in one group or in groups of several channels."""
    for node in _calls(gm, aten.conv1d.default, aten.conv2d.default):
        x, weight, bias, stride, padding, _, groups = arguments(node)
        if not _is_weight(weight) or parameter_of(x) is not None:
            continue
        features, channels, *kernel = _sizes(weight)
        _, *sizes = _sizes(x)
        if {*kernel} != {1} or (groups > 1 and channels == 1):
            continue  # it mixes neighbours, or no channels
        if {*stride} != {1} or {*padding} != {0}:
            _leave(node, f"a 1×1 convolution with stride {stride} and padding {padding}")
            continue
        if len(sizes) != len(kernel) + 1 or not all(isinstance(size, int) for size in sizes) or {*sizes[1:]} == {1}:
            _leave(node, _NO_TOKENS)
            continue
        insert, tokens = Insertion(gm, node), string.ascii_lowercase[: len(kernel)]
        if groups == 1:
            matrix = insert.call(aten.reshape.default, weight, [features, channels])
            product = _Product(x, f"BD{tokens}", matrix, "ND", f"BN{tokens}", bias)
            _replace(insert, node, product.as_linears(insert))
            continue
        parts = insert.call(aten.unflatten.int, x, 1, [groups, channels])
        matrices = insert.call(aten.reshape.default, weight, [groups, features // groups, channels])
        if bias is not None:
            bias = insert.call(aten.reshape.default, bias, [groups, features // groups])
        product = _Product(parts, f"BKD{tokens}", matrices, "KND", f"BKN{tokens}", bias)
        _replace(insert, node, insert.call(aten.flatten.using_ints, product.as_linears(insert), 1, 2))
    return gm


def linears_on_tokens(gm: GraphModule) -> GraphModule:
    """(B, H, W, D) → (B, H·W, D) around each linear."""
    for node in _calls(gm, aten.linear.default):
        batch, *tokens, _ = _sizes(node.args[0])
        if parameter_of(node.args[1]) is None or on_tokens(node):
            continue
        if isinstance(batch, int) or not tokens or not all(isinstance(size, int) for size in tokens):
            _leave(node, _NO_BATCH if isinstance(batch, int) else _NO_TOKENS)
            continue
        insert = Insertion(gm, node)
        flat = insert.call(aten.flatten.using_ints, node.args[0], 1, -2)
        product = insert.call(aten.linear.default, flat, *node.args[1:])
        _replace(insert, node, insert.call(aten.unflatten.int, product, 1, tokens))
    return gm


canonicalize = Pipeline(
    GraphStage.CAPTURED,
    (matmul_to_linear, einsum_to_linear, conv_to_linear, linears_on_tokens, own_weights, unshare_weights),
)
"""In this order: three passes make linears, on any number of axes, one their tokens, and two their weights."""


@dataclass(frozen=True, slots=True)
class _Product:
    """A product of tokens with a weight, or with one for each index of an axis; one letter names an axis."""

    x: Node
    x_axes: str
    weight: Node
    weight_axes: str
    out_axes: str
    bias: Node | None = None
    """(N,), or (K, N) where there are K weights."""

    @property
    def inner(self) -> str:
        """Channels in: the axis that is summed."""
        return "".join(axis for axis in self.weight_axes if axis in self.x_axes and axis not in self.out_axes)

    @property
    def group(self) -> str:
        """The axis of K, if there is one."""
        return "".join(axis for axis in self.weight_axes if axis in self.x_axes and axis in self.out_axes)

    @property
    def new(self) -> str:
        """Channels out."""
        return "".join(axis for axis in self.weight_axes if axis not in self.x_axes)

    @property
    def rest(self) -> str:
        """The batch, then the tokens."""
        rest = [axis for axis in self.x_axes if axis not in self.weight_axes]
        return "".join(sorted(rest, key=lambda axis: isinstance(_sizes(self.x)[self.x_axes.index(axis)], int)))

    def obstacle(self) -> str | None:
        """Why linears cannot compute it."""
        named = (self.x_axes, self.weight_axes, self.out_axes)
        if any(len({*axes}) < len(axes) for axes in named) or {*self.out_axes} != {*self.group, *self.new, *self.rest}:
            return "it is more than a sum over channels"
        if (len(self.inner), len(self.new)) != (1, 1) or len(self.group) > 1:
            return "its weight is not a row of matrices (K, N, D)"
        x, weight = (dict(zip(axes, _sizes(node), strict=True)) for axes, node in self._operands())
        if any(x[axis] != weight[axis] for axis in self.inner + self.group):
            return "it expands an axis of size one"
        if [axis for axis in self.x_axes if not isinstance(x[axis], int)] != [*self.rest[:1]]:
            return "its input has no axis that is the batch"
        is_linear = self.x_axes == self.rest + self.inner and self.out_axes == self.rest + self.new
        return None if len(self.rest) > 1 or is_linear else _NO_TOKENS

    def as_linears(self, insert: Insertion) -> Node:
        """The result, in the axes of the product."""
        if not self.group:
            return self._linear(insert, self.x, self.weight, self.bias)
        results = []
        for k in range(_sizes(self.weight)[self.weight_axes.index(self.group)]):
            x, weight = (
                insert.call(aten.select.int, node, axes.index(self.group), k) for axes, node in self._operands()
            )
            bias = None if self.bias is None else insert.call(aten.select.int, self.bias, 0, k)
            results.append(self._linear(insert, x, weight, bias))
        return insert.call(aten.stack.default, results, self.out_axes.index(self.group))

    def _operands(self) -> tuple[tuple[str, Node], tuple[str, Node]]:
        return (self.x_axes, self.x), (self.weight_axes, self.weight)

    def _linear(self, insert: Insertion, x: Node, weight: Node, bias: Node | None) -> Node:
        x_axes, weight_axes, out_axes = (
            axes.replace(self.group, "") for axes in (self.x_axes, self.weight_axes, self.out_axes)
        )
        x = _arranged(insert, x, x_axes, self.rest + self.inner)
        weight = _arranged(insert, weight, weight_axes, self.new + self.inner)
        product = insert.call(aten.linear.default, x, weight, *([] if bias is None else [bias]))
        return _arranged(insert, product, self.rest + self.new, out_axes)


def _rewrite(
    gm: GraphModule, node: Node, left: Node, right: Node, axes: tuple[str, str, str], bias: Node | None = None
) -> None:
    """Replaces a product by linears, or says why not."""
    operands = ((left, axes[0]), (right, axes[1]))
    (x, x_axes), (weight, weight_axes) = reversed(operands) if _is_weight(left) else operands
    product = _Product(x, x_axes, weight, weight_axes, axes[2], bias)
    if (why := product.obstacle()) is not None:
        _leave(node, why)
    else:
        insert = Insertion(gm, node)
        _replace(insert, node, product.as_linears(insert))


def _replace(insert: Insertion, node: Node, result: Node) -> None:
    """Replaces a node by `result` in the strides of the node: views further on rely on them."""
    wanted = node.meta["val"]
    if result.meta["val"].stride() != wanted.stride():
        axes = list(range(wanted.dim()))
        order = sorted(axes, key=wanted.stride, reverse=True)
        ordered = insert.call(aten.contiguous.default, _arranged(insert, result, axes, order))
        result = _arranged(insert, ordered, order, axes)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _arranged(insert: Insertion, node: Node, have: Sequence[Any], want: Sequence[Any]) -> Node:
    order = [have.index(axis) for axis in want]
    return node if order == sorted(order) else insert.call(aten.permute.default, node, order)


def _leave(node: Node, why: str) -> None:
    logger.info("%s (%s in %s) stays in floating point: %s", node.name, node.target, scope(node) or "the model", why)


def _calls(gm: GraphModule, *targets: Any) -> list[Any]:
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in targets]


def _is_weight(node: Node) -> bool:
    return parameter_of(node) is not None and _rank(node) >= 2


def _sizes(node: Node) -> Sequence[Any]:
    return node.meta["val"].shape


def _rank(node: Node) -> int:
    return len(_sizes(node))
