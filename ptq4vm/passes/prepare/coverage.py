"""Tells which products of weights a graph quantizes, which it leaves and why, and what each costs.

The cost of a product is its multiply-adds for one image: tokens · D · N of a linear, whichever way it is written.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.batch_axis import depend_on_images
from ptq4vm.graph.insert import aten
from ptq4vm.graph.sites import LEFT, LinearSite, numbered, weight_label
from ptq4vm.graph.views import parameter_of, scope, writes_stream
from ptq4vm.metadata import Coverage, ProductMetadata


def covered(
    gm: GraphModule, sites: Mapping[Node, LinearSite], left: Mapping[Node, str], quantized: set[Node]
) -> Coverage:
    """Returns a record of every product of a weight in a canonical graph.

    Args:
        gm: its products that are no linears on tokens have the reason in their metadata.
        sites: the linears on tokens.
        left: why linears and other products are left, where it is not for the reason in their metadata.
        quantized: nodes whose weight is quantized, linears and convolutions.
    """
    images, seen = depend_on_images(gm.graph), dict.fromkeys((site.name for site in sites.values()), 0)
    products: list[ProductMetadata] = []
    convolutions: list[ProductMetadata] = []
    for node in gm.graph.nodes:
        if node not in images or not multiplies_weight(node):
            continue
        name = sites[node].name if node in sites else numbered(_label(node, images), seen)
        is_product = node.target not in _CONVOLUTIONS or LEFT in node.meta
        reason = left.get(node, node.meta.get(LEFT, None if is_product else "convolution of neighbours"))
        reason = None if node in quantized else reason
        record = ProductMetadata(name=name, multiply_adds=_multiply_adds(node), left=reason)
        (products if is_product else convolutions).append(record)
    return Coverage(products=tuple(products), convolutions=tuple(convolutions))


def ends(gm: GraphModule) -> dict[Node, str]:
    """Returns `stem` for the products of weights that none precedes, and `head` for those that no such product and no
    scan follows, that write no residual stream, and that gate nothing."""
    images = depend_on_images(gm.graph)
    products = {node for node in gm.graph.nodes if node in images and multiplies_weight(node)}
    working = products | {node for node in gm.graph.nodes if _is_foreign(node)}
    behind = _reached(gm.graph.nodes, products, lambda node: node.all_input_nodes)
    ahead = _reached(reversed(gm.graph.nodes), working, lambda node: node.users)
    last = {node for node in products if node not in ahead and not writes_stream(node) and not _gates(node, images)}
    return {**dict.fromkeys(last, "head"), **dict.fromkeys(products - behind, "stem")}


def _reached(nodes: Iterable[Node], sources: set[Node], towards: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Returns the nodes that come after `sources` in an order of the graph."""
    found: set[Node] = set()
    for node in nodes:
        if any(other in sources or other in found for other in towards(node)):
            found.add(node)
    return found


def _gates(node: Node, images: set[Node]) -> bool:
    """Returns whether what follows from a value multiplies another value of the image."""
    after = _reached(node.graph.nodes, {node}, lambda other: other.all_input_nodes) | {node}
    products = (other for other in after if other.target is aten.mul.Tensor)
    return any(source in images and source not in after for other in products for source in other.all_input_nodes)


def multiplies_weight(node: Node) -> bool:
    """Returns whether a node multiplies a weight with what it reads, in whichever way."""
    linear = node.target is aten.linear.default and parameter_of(node.args[1]) is not None
    return linear or LEFT in node.meta or node.target in _CONVOLUTIONS


def _is_foreign(node: Node) -> bool:
    """Returns whether a node is a scan, or another operator that is none of torch's own."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims")


def _label(node: Node, images: set[Node]) -> str:
    """Returns the name of a product's weight, or of its module where that is computed."""
    weights = [value for value in node.all_input_nodes if value not in images and parameter_of(value) is not None]
    matrices = [value for value in weights if value.meta["val"].dim() > 1]
    return weight_label(str(parameter_of(matrices[0]))) if matrices else scope(node) or node.name


def _multiply_adds(node: Any) -> int:
    """Returns the multiply-adds of a product for one image."""
    if node.target in _TRANSPOSED:
        x, weight = node.args[:2]
        return _elements(x) * math.prod(weight.meta["val"].shape[1:])
    return _SUMMED[node.target](node) * _elements(node)


def _elements(node: Node) -> int:
    """Returns the number of elements of a value that belong to one image."""
    return math.prod(_size(size) for size in node.meta["val"].shape)


def _size(size: Any) -> int:
    """Returns a size for one image."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr.subs(dict.fromkeys(expr.free_symbols, 1)))


def _kernel(position: int) -> Callable[[Any], int]:
    """Sums over all axes of a weight but those of channels out."""
    return lambda node: math.prod(node.args[position].meta["val"].shape[1:])


def _einsum(node: Any) -> int:
    equation, operands = node.args[:2]
    inputs, _, out = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for axes, operand in zip(inputs.split(","), operands, strict=True):
        before, _, after = axes.partition("...")
        shape = operand.meta["val"].shape
        sizes |= dict(zip(before, map(_size, shape), strict=False))
        sizes |= dict(zip(reversed(after), map(_size, reversed(shape)), strict=False))
    summed = {*sizes} - {*out} if "->" in equation else {a for a in sizes if inputs.count(a) > 1}
    return math.prod(sizes[axis] for axis in summed)


def _last(position: int) -> Callable[[Any], int]:
    """Sums over the last axis of an argument."""
    return lambda node: _size(node.args[position].meta["val"].shape[-1])


_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_KERNELS = (
    ops.causal_conv1d.default,
    *(getattr(aten, f"conv{n}d").default for n in (1, 2, 3)),
    *(getattr(aten, f"conv{n}d").padding for n in (1, 2, 3)),
)
_CONVOLUTIONS = {*_TRANSPOSED, *_KERNELS}
_SUMMED: Mapping[Any, Callable[[Any], int]] = {
    **dict.fromkeys(_KERNELS, _kernel(1)),
    aten.bilinear.default: _kernel(2),
    **dict.fromkeys((aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default), _last(0)),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _last(1)),
    aten.inner.default: _last(0),
    aten.tensordot.default: lambda node: math.prod(
        _size(node.args[0].meta["val"].shape[axis]) for axis in node.args[2]
    ),
    aten.einsum.default: _einsum,
}
"""The number of products that make one element of a result."""
