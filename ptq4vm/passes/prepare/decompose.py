"""Taking apart what one operator computes and several quantizers must see, and finding those places.

Shapes: x (B, L, C), or (B, C, H, W) where a 2-D convolution gave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.config import Granularity
from ptq4vm.graph.insert import Insertion, aten, replace_node
from ptq4vm.graph.sites import CONVOLUTIONS, LinearSite
from ptq4vm.graph.token_order import channels_first, moves_tokens
from ptq4vm.graph.views import parameter_of, scope
from ptq4vm.passes.prepare.rotate import writes_stream
from ptq4vm.passes.prepare.select import OutputSite, ScanSite


def expose_operators(gm: GraphModule) -> GraphModule:
    """Convolution and SiLU, softplus, scan, skip connection and gate one by one; linears of (B, D) on one token."""
    for node in gm.graph.find_nodes(op="call_function", target=ops.causal_conv1d.default):
        *inputs, silu = node.args
        if silu:
            insert = Insertion(gm, node)
            replace_node(node, insert.call(aten.silu.default, insert.call(ops.causal_conv1d.default, *inputs, False)))
    for node in gm.graph.find_nodes(op="call_function", target=ops.selective_scan.default):
        replace_node(node, _scan(Insertion(gm, node), node))
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, *bias = node.args
        if x.meta["val"].dim() == 2 and parameter_of(weight) is not None:
            insert = Insertion(gm, node)
            product = insert.call(aten.linear.default, insert.call(aten.unsqueeze.default, x, 1), weight, *bias)
            replace_node(node, insert.call(aten.squeeze.dim, product, 1))
    return gm


def _scan(insert: Insertion, node: Node) -> Node:
    u, delta, A, B, C, D, z, bias, softplus = node.args
    if bias is not None:
        delta = insert.call(aten.add.Tensor, delta, bias)
    if softplus:
        delta = insert.call(aten.softplus.default, delta)
    y = insert.call(ops.selective_scan.default, u, delta, A, B, C, None, None, None, False)
    if D is not None:
        y = insert.call(aten.add.Tensor, y, insert.call(aten.mul.Tensor, u, D))
    return y if z is None else insert.call(aten.mul.Tensor, y, insert.call(aten.silu.default, z))


_KINDS: dict[Any, str] = {
    ops.causal_conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.rms_norm.default: "norm",
    aten.layer_norm.default: "norm",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.softplus.default: "softplus",
    ops.selective_scan.default: "selective_scan",
}


def output_sites(gm: GraphModule, linears: Sequence[LinearSite], k_scaled: bool) -> list[OutputSite]:
    """What is quantized where it is made, in graph order: the results of linears and of the operators above."""
    names = {linear.node: linear.name for linear in linears}
    sites: list[OutputSite] = []
    seen: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node in names:
            name = names[node]
        elif node.target in _KINDS:
            name = operator_name(node, seen)
        else:
            continue
        granularity, axis, power_of_two = _granularity(node) if k_scaled else (Granularity.PER_TENSOR, 1, False)
        sites.append(OutputSite(name, node, granularity, axis, power_of_two))
    return sites


def operator_name(node: Node, seen: dict[str, int]) -> str:
    """`layers.0.mixer.silu`, at a second one there `layers.0.mixer.silu@1`."""
    kind = _KINDS[node.target]
    label = f"{scope(node)}.{kind}".removeprefix(".")
    count = seen[label] = seen.get(label, -1) + 1
    return f"{label}@{count}" if count else label


def _granularity(node: Node) -> tuple[Granularity, int, bool]:
    """Several intervals where the k-scaled paper has them; its axis, and whether their ratios are powers of two."""
    value = node.meta["val"]
    dims = value.dim()
    channels = 1 if channels_first(node) else dims - 1
    if node.target is ops.selective_scan.default or (node.target is aten.linear.default and writes_stream(node)):
        return Granularity.K_SCALED_TOKEN, 1, True
    if node.target is ops.causal_conv1d.default or _is_depthwise(node):
        return Granularity.K_SCALED_CHANNEL, channels, True
    if node.target in (aten.silu.default, aten.gelu.default, aten.softplus.default) and dims > 2:
        return Granularity.K_SCALED_CHANNEL, channels, False
    return Granularity.PER_TENSOR, 1, False


def _is_depthwise(node: Node) -> bool:
    if node.target is not aten.conv2d.default:
        return False
    x, weight = node.args[:2]
    return weight.meta["val"].shape[1] == 1 < x.meta["val"].shape[1]  # type: ignore[union-attr]


def read_site(linear: LinearSite, sites: Sequence[OutputSite]) -> OutputSite | None:
    """The quantized value whose elements a linear reads, if all of it has one step size, which serves the linear too.

    Step sizes of channels would have to go into the weight, which then needs a finer one: what has them is rounded
    again for the linear.
    """
    node: Any = linear.node.args[0]
    while moves_tokens(node) and node.target is not aten.cat.default:
        node = node.args[0]
    found = next((site for site in sites if site.node is node), None)
    return found if found is not None and found.granularity is Granularity.PER_TENSOR else None


def convolution_weights(gm: GraphModule) -> dict[str, Node]:
    """Convolutions of parameters, by name."""
    seen: dict[str, int] = {}
    nodes = [node for node in gm.graph.nodes if node.target in CONVOLUTIONS and parameter_of(node.args[1]) is not None]
    return {operator_name(node, seen): node for node in nodes}


def scan_sites(gm: GraphModule) -> list[ScanSite]:
    """All scans; raises ValueError where there are none."""
    seen: dict[str, int] = {}
    nodes = gm.graph.find_nodes(op="call_function", target=ops.selective_scan.default)
    if not nodes:
        raise ValueError("state is for models with a selective scan, and this one has none: leave it out")
    return [ScanSite(operator_name(node, seen), node) for node in nodes]
