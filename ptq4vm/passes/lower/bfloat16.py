"""Activations between fused operators as bfloat16: half the memory, less precision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from ptq4vm import ops
from ptq4vm.graph.element_numbers import moves_elements
from ptq4vm.graph.insert import Insertion, aten, replace_node, value_of
from ptq4vm.passes.lower.patterns import args, read_constant

# Where an operator reads activations that may be bfloat16.
_READS = {
    ops.norm_quantize.default: (0,),
    ops.rotate_quantize.default: (0,),
    ops.gate_quantize.default: (0, 1),
    ops.conv1d_quantize.default: (0,),
    ops.conv2d_quantize.default: (0,),
    ops.directional_scan.default: (13,),
    ops.directional_scan_quantize.default: (13,),
}


def use_bfloat16_activations(gm: GraphModule) -> GraphModule:
    """Linears whose readers all take bfloat16 write it; so do the convolutions and scans that read them.

    The convolutions between stages and before the first block are computed in bfloat16, and return float32.
    """
    for conv in gm.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        if all(isinstance(term, Node) and term.op == "get_attr" for term in args(conv)[1:3]):
            _halve_convolution(gm, conv)
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear_packed.default):
        if args(node)[-1] is torch.float32 and _read_by(node, _READS):
            node.args = (*node.args[:-1], torch.bfloat16)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and "val" in node.meta:
            node.meta["val"] = value_of(gm, node.target, node.args, node.kwargs)
            half = node.target is ops.directional_scan.default and node.meta["val"].dtype is torch.bfloat16
            if half and not _read_by(node, _READS):
                _widen(gm, node)
    return gm


def _widen(gm: GraphModule, node: Node) -> None:
    with gm.graph.inserting_after(node):
        wide = gm.graph.call_function(aten.to.dtype, (node, torch.float32))
    wide.meta["val"] = value_of(gm, wide.target, wide.args)
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def _halve_convolution(gm: GraphModule, conv: Node) -> None:
    insert, (x, *constants) = Insertion(gm, conv), args(conv)
    halves = [
        insert.tensor(f"{constant.target}_bfloat16", read_constant(gm, constant, "").bfloat16())
        for constant in constants[:2]
    ]
    y = insert.call(aten.conv2d.default, insert.call(aten.to.dtype, x, torch.bfloat16), *halves, *constants[2:])
    replace_node(conv, insert.call(aten.to.dtype, y, torch.float32))


def _read_by(node: Node, slots: Mapping[Any, tuple[int, ...]]) -> bool:
    """Returns whether all readers, also of views of it, are these operators, which read it in these places alone."""
    for user in node.users:
        if moves_elements(user) or user.target is aten.unsqueeze.default:
            if not _read_by(user, slots):
                return False
        else:
            places = slots.get(user.target, ())
            others = [value for i, value in enumerate(user.args) if i not in places]
            if any(value is node for value in tree_leaves((others, user.kwargs))):
                return False
    return bool(node.users)
