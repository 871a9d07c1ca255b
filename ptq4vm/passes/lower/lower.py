"""Quantize, dequantize, linear ⇒ `ptq4vm::quantize` and `ptq4vm::linear`: the same integers, now really integers.

The two stay two nodes, so that a later pass can fold the quantize into whatever produced its input.
"""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion, aten, attribute, replace_node
from ptq4vm.ops import layouts
from ptq4vm.quantizers import OUTPUT
from ptq4vm.quantizers import quantized_decomposed as qdq


def lower(gm: GraphModule) -> GraphModule:
    """Lowers every linear whose input and weight are dequantized; others stay as they are."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, *bias = node.args
        row = None
        if _target(x) is aten.slice_scatter.default:
            x, row, *where = x.args
        if _target(weight) is not qdq.dequantize_per_channel.default or _target(x) not in _INPUTS or OUTPUT in x.meta:
            continue
        name = str(weight.args[0].target).removesuffix(".weight_q")
        insert = Insertion(gm, node)
        codes, scale, zero_point = _INPUTS[_target(x)](insert, name, x)
        integers, bits = attribute(gm, f"{name}.weight_q"), _bits(weight.args[5])
        weight_q = insert.tensor(f"{name}.weight_q", layouts.pack_int4(integers) if bits <= 4 else integers)
        arguments = (weight_q, weight.args[1], bias[0] if bias else None)
        dtype = node.meta["val"].dtype if "val" in node.meta else torch.float32
        product = insert.call(ops.linear.default, codes, scale, zero_point, *arguments, dtype)
        if row is not None:
            # the class token in floating point
            exact = insert.call(aten.linear.default, row, weight, *bias)
            product = insert.call(aten.slice_scatter.default, product, exact, *where)
        replace_node(node, product)
    return _lower_outputs(gm)


def _lower_outputs(gm: GraphModule) -> GraphModule:
    """Lowers outputs that are quantized where they are made: the same codes, and floats from them for all readers.

    Where step sizes are several, x is divided by them and rounded to whole numbers.
    """
    for node in [node for node in gm.graph.nodes if OUTPUT in node.meta]:
        codes, name, insert = node.args[0], node.meta[OUTPUT], Insertion(gm, node)
        x, several = codes.args[0], node.target is qdq.dequantize_per_channel.default
        if several:
            scale, axis, bits = attribute(gm, str(codes.args[1].target)), codes.args[3], _bits(codes.args[5])
            steps = scale.view(-1, *[1] * (x.meta["val"].dim() - 1 - axis))
            x = insert.call(aten.mul.Tensor, x, insert.tensor(f"{name}.output_inv_steps", 1.0 / steps))
            scale = torch.ones(1)
        else:
            scale, bits = torch.tensor([codes.args[1]], dtype=torch.float32), _bits(codes.args[4])
        step = insert.tensor(f"{name}.output_scale", scale)
        inverse = insert.tensor(f"{name}.output_inv_scale", 1.0 / scale)
        zero = insert.tensor(f"{name}.output_zero_point", torch.zeros(1, dtype=torch.int32))
        lowered = insert.call(ops.quantize.default, x, inverse, zero, None, bits)
        value = insert.call(ops.dequantize.default, lowered, step, zero)
        if several:
            value = insert.call(aten.mul.Tensor, value, insert.tensor(f"{name}.output_steps", steps))
        replace_node(node, value)
    return gm


def _target(node: Any) -> Any:
    return node.target if isinstance(node, Node) else None


def _bits(high: int) -> int:
    return (high + 1).bit_length()


def _smoothed(codes: Node) -> tuple[Node, Node | None]:
    """The quantized value and, where it is x · inv_smooth for this quantizer alone, x and inv_smooth."""
    x: Any = codes.args[0]
    factor = x.args[1] if _target(x) is aten.mul.Tensor else None
    if str(_target(factor)).endswith(".inv_smooth"):
        return x.args[0], factor
    return x, None


def _static(insert: Insertion, name: str, x: Node) -> tuple[Node, Node, Node]:
    codes: Any = x.args[0]
    if x.target is qdq.dequantize_per_tensor.default:
        scale_value = torch.tensor([codes.args[1]], dtype=torch.float32)
        zero_value = torch.tensor([codes.args[2]], dtype=torch.int32)
        bits = _bits(codes.args[4])
    else:
        scale_value, zero_value = (attribute(insert.gm, str(codes.args[i].target)) for i in (1, 2))
        bits = _bits(codes.args[5])
    scale = insert.tensor(f"{name}.input_scale", scale_value)
    zero_point = insert.tensor(f"{name}.input_zero_point", zero_value)
    inverse = insert.tensor(f"{name}.input_inv_scale", 1.0 / scale_value)
    source, inv_smooth = _smoothed(codes)
    return insert.call(ops.quantize.default, source, inverse, zero_point, inv_smooth, bits), scale, zero_point


def _dynamic(insert: Insertion, name: str, x: Node) -> tuple[Node, Node, Node]:
    codes: Any = x.args[0]
    source, inv_smooth = _smoothed(codes)
    bits = codes.args[4]
    pair = insert.call(ops.choose_qparams.default, source, inv_smooth, bits)
    scale, zero_point = (insert.call(operator.getitem, pair, i) for i in (0, 1))
    inverse = insert.call(aten.reciprocal.default, scale)
    return insert.call(ops.quantize.default, source, inverse, zero_point, inv_smooth, bits), scale, zero_point


_INPUTS = {
    qdq.dequantize_per_channel.default: _static,
    qdq.dequantize_per_tensor.default: _static,
    ops.dequantize.default: _dynamic,
}
