"""Decomposes operators that compute several values of which each is to be quantized.

Shapes: x (B, L, C), or (B, C, H, W) where a 2-D convolution gave it.
"""

from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion, aten, replace_node
from ptq4vm.graph.views import parameter_of


def decompose_fused_ops(gm: GraphModule) -> GraphModule:
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
