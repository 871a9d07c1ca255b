"""Every product of a weight with tokens becomes `aten.linear` of a 2-D parameter on (B, L, D): one form for all passes.

What cannot be one has the reason in its metadata, under `ptq4vm.graph.sites.LEFT`. Shapes: B images (dynamic), L or
H × W tokens, D channels in, N out, K weights or groups. A product with K weights becomes K linears.
"""

import dataclasses
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from ptq4vm.graph.batch_axis import BatchAxis, batch_axes, depend_on_images
from ptq4vm.graph.insert import Insertion, arguments, aten
from ptq4vm.graph.pipeline import Pipeline
from ptq4vm.graph.sites import LEFT, POOLED
from ptq4vm.graph.verify import GraphStage
from ptq4vm.graph.views import parameter_of
from ptq4vm.passes.prepare.own_weights import own_weights, unshare_weights
from ptq4vm.passes.prepare.products import NO_BIAS, Operand, Product, arranged

_MIXED = "the order of images and tokens in its input cannot be derived"
_COMPUTED = "its weight is computed, and no parameter"


def matmul_to_linear(gm: GraphModule) -> GraphModule:
    """`x @ W`, `W @ x`, `addmm(b, x, W)`, `tensordot` and `inner`."""
    return _to_linears(gm, _MATMULS)


def einsum_to_linear(gm: GraphModule) -> GraphModule:
    """`b l d, n d -> b l n` and, with K weights, `b k d l, k n d -> b k n l`; an ellipsis may stand for axes."""
    return _to_linears(gm, {aten.einsum.default: _einsum})


def conv_to_linear(gm: GraphModule) -> GraphModule:
    """1×1 convolutions of (B, D, L) or (B, D, H, W), in one group or in groups of several channels."""
    return _to_linears(gm, _CONVOLUTIONS)


def linears_on_tokens(gm: GraphModule) -> GraphModule:
    """(B, H, W, D), (L, B, D) or (B · L, D) → (B, L, D) around each linear."""
    return _to_linears(gm, {target: READERS[target] for target in (aten.linear.default, aten.bilinear.default)})


def pooled_to_linear(gm: GraphModule) -> GraphModule:
    """Products of one value per image, such as those of squeeze-and-excitation → linears on one token."""
    axes, reached = batch_axes(gm.graph), depend_on_images(gm.graph)
    for node in _calls(gm, READERS):
        product = _placed(node, READERS, axes, reached) if node.meta.get(LEFT) == POOLED else None
        if isinstance(product, Product):
            _replace(gm, node, dataclasses.replace(product, lifted=True), axes, reached)
    return gm


def canonicalization(pooled: bool) -> Pipeline:
    """Returns passes in this order: four make linears on tokens, one those of pooled values, two their weights."""
    products = (matmul_to_linear, einsum_to_linear, conv_to_linear, linears_on_tokens)
    weights = (own_weights, unshare_weights)
    return Pipeline(GraphStage.CAPTURED, (*products, *((pooled_to_linear,) if pooled else ()), *weights))


canonicalize = canonicalization(pooled=False)


_Reader = Callable[[Any, set[Node]], Product | str | None]
"""Takes a node, and the values that depend on images; returns the product that it computes, why that is none to be
replaced, or None where it multiplies no weight with tokens."""


def _to_linears(gm: GraphModule, readers: Mapping[Any, _Reader]) -> GraphModule:
    """Replaces products by linears, or notes why not."""
    axes, reached = batch_axes(gm.graph), depend_on_images(gm.graph)
    for node in _calls(gm, readers):
        product, linear = _placed(node, readers, axes, reached), node.target is aten.linear.default
        if product is None or LEFT in node.meta:
            continue
        if isinstance(product, str):
            node.meta[LEFT] = product
        elif product.pooled and not (product.canonical and (product.tokens or not linear)):
            node.meta[LEFT] = POOLED
        elif not (linear and product.canonical):
            _replace(gm, node, product, axes, reached)
    return gm


def _placed(
    node: Node, readers: Mapping[Any, _Reader], axes: Mapping[Node, BatchAxis], reached: set[Node]
) -> Product | str | None:
    """Returns the product of a node, its images apart from the tokens, or why there is none."""
    product = readers[node.target](node, reached)
    if not isinstance(product, Product):
        return product
    product = product.shared()
    if (obstacle := product.obstacle()) is not None:
        return obstacle
    return product.on(axes[product.x.node]) if product.x.node in axes else _MIXED


def _replace(gm: GraphModule, node: Node, product: Product, axes: dict[Node, BatchAxis], reached: set[Node]) -> None:
    """Replaces a node by linears, in the strides of the node: views further on rely on them."""
    insert = Insertion(gm, node)
    result, wanted = product.as_linears(insert), node.meta["val"]
    if result.meta["val"].stride() != wanted.stride():
        places = list(range(wanted.dim()))
        order = sorted(places, key=wanted.stride, reverse=True)
        ordered = insert.call(aten.contiguous.default, arranged(insert, result, places, order))
        result = arranged(insert, ordered, order, places)
    reached.add(result)
    if node in axes:
        axes[result] = axes[node]
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _weight(operands: Sequence[Node], reached: set[Node]) -> int | str | None:
    """Returns which operand is a weight that images are multiplied with, or why it is none that can be quantized."""
    fixed = [index for index, operand in enumerate(operands) if operand not in reached]
    if len(fixed) != 1 or _rank(operands[fixed[0]]) < 2:
        return None
    return fixed[0] if parameter_of(operands[fixed[0]]) is not None else _COMPUTED


def _product(
    left: Operand, right: Operand, out: str, reached: set[Node], bias: Operand | None = None
) -> Product | str | None:
    side = _weight((left.node, right.node), reached)
    if not isinstance(side, int):
        return side
    x, weight = (left, right) if side == 1 else (right, left)
    return Product(x, weight, list(out), bias)


def _matmul(node: Any, reached: set[Node]) -> Product | str | None:
    bias, left, right = node.args if node.target in _SUMS else (None, *node.args)
    if 1 in (_rank(left), _rank(right)):
        return None
    extra = _rank(left) - _rank(right)
    batch = string.ascii_lowercase[: max(_rank(left), _rank(right)) - 2]
    out = batch + "MN"
    operands = Operand(left, batch[max(-extra, 0) :] + "MD"), Operand(right, batch[max(extra, 0) :] + "DN")
    product = _product(*operands, out, reached)
    if bias is None or not isinstance(product, Product):
        return product
    if node.kwargs or bias in reached:
        return NO_BIAS
    axes, wide = out[len(out) - _rank(bias) :], product.weight.sizes({})
    one = [axis for axis, size in zip(axes, _sizes(bias), strict=True) if size == 1 != wide.get(axis)]
    added = Operand(bias, axes, "".join(one))
    return dataclasses.replace(product, bias=added)


_SUMS = (aten.addmm.default, aten.baddbmm.default)


def _tensordot(node: Any, reached: set[Node]) -> Product | str | None:
    """Sums over some axes of both operands; what is left of the first one comes first."""
    left, right = node.args[:2]
    of_left, of_right = node.args[2:4] or ([-1], [-1])  # `inner` has none
    axes, others = [*string.ascii_lowercase[: _rank(left)]], [*string.ascii_uppercase[: _rank(right)]]
    for one, other in zip(of_left, of_right, strict=True):
        others[other] = axes[one]
    out = [a for a in axes if a not in others] + [a for a in others if a not in axes]
    return _product(Operand(left, axes), Operand(right, others), "".join(out), reached)


def _einsum(node: Any, reached: set[Node]) -> Product | str | None:
    equation, operands = node.args[:2]
    if reached.isdisjoint(operands) or not any(parameter_of(o) and _rank(o) > 1 for o in {*operands} - reached):
        return None
    if len(operands) != 2 or "->" not in equation:
        return f"the equation {equation!r} is not of the form 'x, w -> y'"
    left, right, out = _einsum_axes(equation, [_rank(operand) for operand in operands])
    return _product(Operand(operands[0], left), Operand(operands[1], right), out, reached)


def _einsum_axes(equation: str, ranks: Sequence[int]) -> tuple[str, str, str]:
    """Letters that the equation leaves free stand for its ellipsis."""
    inputs, out = equation.replace(" ", "").split("->")
    named = inputs.split(",")
    hidden = [rank - len(axes.replace("...", "")) for axes, rank in zip(named, ranks, strict=True)]
    free = "".join(sorted({*string.ascii_letters} - {*equation}))[: max(hidden)]
    left, right = (axes.replace("...", free[len(free) - n :]) for axes, n in zip(named, hidden, strict=True))
    return left, right, out.replace("...", free)


def _conv(node: Any, reached: set[Node]) -> Product | str | None:
    x, weight, bias, stride, padding, _, groups = arguments(node)
    features, channels, *kernel = _sizes(weight)
    if {*kernel} != {1} or (groups > 1 and channels == 1) or x not in reached:
        return None  # it mixes neighbours, or no channels
    if not isinstance(side := _weight((x, weight), reached), int):
        return side
    if {*stride} != {1} or not ({*padding} == {0} or isinstance(padding, str)):
        return f"a 1×1 convolution with stride {stride} and padding {padding}"
    images, tokens = ["B"] * (_rank(x) - len(kernel) - 1), [*string.ascii_lowercase[: len(kernel)]]
    ones = string.ascii_uppercase[-len(kernel) :]
    inner, new = ("D", "N") if groups == 1 else ("KD", "KN")
    return Product(
        Operand(x, [*images, inner, *tokens]),
        Operand(weight, [new, "D", *ones], ones),
        [*images, new, *tokens],
        None if bias is None else Operand(bias, [new]),
        {} if groups == 1 else {"K": groups, "D": channels, "N": features // groups},
    )


def _linear(node: Any, reached: set[Node]) -> Product | str | None:
    x, weight, *bias = node.args
    if x not in reached:
        return None
    if not isinstance(side := _weight((x, weight), reached), int):
        return side
    axes = string.ascii_lowercase[: _rank(x) - 1]
    added = Operand(bias[0], "N") if bias and bias[0] is not None else None
    return Product(Operand(x, axes + "D"), Operand(weight, "ND"), axes + "N", added)


def _bilinear(node: Any, reached: set[Node]) -> str | None:
    return None if reached.isdisjoint(node.args[:2]) else "its weight multiplies two inputs"


_MATMULS: Mapping[Any, _Reader] = {
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, *_SUMS), _matmul),
    **dict.fromkeys((aten.tensordot.default, aten.inner.default), _tensordot),
}
_CONVOLUTIONS: Mapping[Any, _Reader] = dict.fromkeys(
    (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding), _conv
)
READERS: Mapping[Any, _Reader] = {
    **_MATMULS,
    aten.einsum.default: _einsum,
    **_CONVOLUTIONS,
    aten.linear.default: _linear,
    aten.bilinear.default: _bilinear,
}
"""Of every operator that can multiply a weight with tokens, but for convolutions of neighbours."""


def _calls(gm: GraphModule, targets: Iterable[Any]) -> list[Any]:
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in targets]


def _sizes(node: Node) -> Sequence[Any]:
    return node.meta["val"].shape


def _rank(node: Node) -> int:
    return len(_sizes(node))
