"""Every product with a weight becomes `aten.linear` on (B, L, D), so that later passes know one form."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ptq4vm.graph import Insertion, aten, parameter_of


def matmul_to_linear(gm: GraphModule) -> GraphModule:
    """`x @ W` and `addmm(b, x, W)` with a parameter W → `linear(x, Wᵀ, b)`."""
    for node in list(gm.graph.nodes):
        if node.target in (aten.matmul.default, aten.mm.default):
            bias, (x, weight) = None, node.args
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = node.args
        else:
            continue
        if parameter_of(weight) is None or parameter_of(x) is not None or weight.meta["val"].dim() != 2:
            continue
        insert = Insertion(gm, node)
        transposed = weight.args[0] if weight.target is aten.t.default else insert.call(aten.t.default, weight)
        args = (x, transposed) if bias is None else (x, transposed, bias)
        node.replace_all_uses_with(insert.call(aten.linear.default, *args))
        gm.graph.erase_node(node)
    return gm


def linears_on_tokens(gm: GraphModule) -> GraphModule:
    """(B, H, W, D) → (B, H·W, D) around each linear; (B, D), which has no tokens, stays."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        x = node.args[0]
        shape = x.meta["val"].shape
        if len(shape) <= 3 or parameter_of(node.args[1]) is None:
            continue
        tokens = list(shape[1:-1])
        if not all(isinstance(size, int) for size in tokens):
            continue
        insert = Insertion(gm, node)
        flat = insert.call(aten.flatten.using_ints, x, 1, -2)
        product = insert.call(aten.linear.default, flat, *node.args[1:])
        node.replace_all_uses_with(insert.call(aten.unflatten.int, product, 1, tokens))
        gm.graph.erase_node(node)
    return gm


def unshare_transposes(gm: GraphModule) -> GraphModule:
    """`linear(x, Wᵀᵀ)` → `linear(x, W)`: two transposes in a row cancel."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.t.default):
        inner = node.args[0]
        if isinstance(inner, Node) and inner.target is aten.t.default:
            node.replace_all_uses_with(inner.args[0])
    return gm


CANONICALIZE = (matmul_to_linear, unshare_transposes, linears_on_tokens)
