"""Producers that quantize: what makes an activation also writes its codes, and scans move no tokens.

    norm (and the residual sum before it) (→ rotate) → quantize  ⇒ norm_quantize
    moved tokens → causal convolution → SiLU → quantize, K times ⇒ conv1d_quantize
    depth-wise 2-D convolution → SiLU → moved → quantize, K times ⇒ conv2d_quantize
    linear → GELU (→ rotate) → quantize                          ⇒ linear_gelu_quantize
    (GELU →) rotate → quantize                                   ⇒ rotate_quantize
    product with a gate (its SiLU), or a sum of some → quantize  ⇒ gate_quantize
    projection → step → scan, K directions, gate, sum, quantize  ⇒ linear_packed and directional_scan(_quantize)
    linear                                                       ⇒ linear_packed

The result computes the same integers up to rounding ties, has its weights in the kernels' layout, and is made to run,
not to be saved. Patterns are found by operators and by where tokens come from, never by a model's name.
"""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion, arguments, aten, follow_device, replace_node
from ptq4vm.graph.pipeline import Pass
from ptq4vm.metadata import FUSIONS
from ptq4vm.passes.lower.fold import FoldConstants, drop_unused_tensors
from ptq4vm.passes.lower.fuse_gates import fuse_gates
from ptq4vm.passes.lower.fuse_scans import fuse_scans
from ptq4vm.passes.lower.layout import simplify_layouts
from ptq4vm.passes.lower.patterns import (
    Fusion,
    NotFused,
    Source,
    args,
    as_tokens,
    is_call,
    only_user,
    pack_weights,
    read_constant,
    read_quantizer,
    record_fusion,
    recorded_skip,
    same_tokens,
    shaped_as,
    source_of,
)
from ptq4vm.passes.lower.stacked_sums import add_stacked_sums
from ptq4vm.serialization.recorded_values import with_values


def fusions(gm: GraphModule) -> tuple[Fusion, ...]:
    """Returns what `fuse` did to a graph, in order; nothing for any other graph."""
    return tuple(gm.meta.get(FUSIONS, ()))


def start_fusions(gm: GraphModule) -> GraphModule:
    """Forgets what was fused before."""
    gm.meta[FUSIONS] = []
    return gm


def drop_identities(gm: GraphModule) -> GraphModule:
    """Dropout in evaluation mode, casts to the type a value has, and the 0 with which a sum of Python's begins."""
    for node in gm.graph.nodes:
        cast = node.target is aten.to.dtype and args(node)[0].meta["val"].dtype is args(node)[1]
        same = is_call(node, aten.add.Tensor) and node.meta["val"].dtype is args(node)[0].meta["val"].dtype
        zero = same and type(args(node)[1]) is int and args(node)[1] == 0
        if cast or zero or (node.target is aten.dropout.default and not args(node)[2]):
            replace_node(node, args(node)[0])
    return gm


def pack_linears(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear.default):
        x, scale, zero_point, weight, weight_scale, bias, dtype = args(node)
        with recorded_skip(gm, node, "linear"):
            value = read_constant(gm, weight, "its weight")
            insert = Insertion(gm, node)
            packed = pack_weights(insert, str(weight.target), [value], x)
            replace_node(
                node, insert.call(ops.linear_packed.default, x, scale, zero_point, *packed, weight_scale, bias, dtype)
            )
            record_fusion(gm, node, "linear")
    return gm


def fuse_gelus(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
        source = source_of(node)
        gelu = same_tokens(source.x)
        if not is_call(gelu, aten.gelu.default):
            continue
        pattern = "linear + GELU + rotate + quantize" if source.rotate else "linear + GELU + quantize"
        with recorded_skip(gm, gelu, pattern):
            read_quantizer(gm, node)
            linear = same_tokens(args(gelu)[0])
            values = (linear, gelu, *source.between)
            if not is_call(linear, ops.linear.default) or any(only_user(value) is None for value in values):
                raise NotFused("GELU's input is not an integer linear's, or what lies between has other readers")
            if arguments(gelu)[1] != "none":
                raise NotFused("the tanh approximation of GELU has no kernel")
            x, scale, zero_point, weight, weight_scale, bias, _ = args(linear)
            value = read_constant(gm, weight, "the weight")
            insert = Insertion(gm, node)
            packed = pack_weights(insert, str(weight.target), [value], x)
            inputs = (x, scale, zero_point, *packed, weight_scale, bias, *_coding(node, source))
            replace_node(node, insert.call(ops.linear_gelu_quantize.default, *inputs))
            record_fusion(gm, linear, pattern)
    return gm


def fuse_norms(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
        source = source_of(node)
        norm = same_tokens(source.x)
        if not is_call(norm, aten.rms_norm.default, aten.layer_norm.default) or only_user(norm) is None:
            continue
        pattern = "norm + rotate + quantize" if source.rotate else "norm + quantize"
        with recorded_skip(gm, norm, pattern):
            quantize = read_quantizer(gm, node)
            rms = norm.target is aten.rms_norm.default
            x, sizes, weight, *rest = arguments(norm)
            bias, eps = (None, rest[0]) if rms else rest[:2]
            if len(sizes) != 1 or x.meta["val"].dim() < 3:
                raise NotFused("it does not normalize the channels of tokens")
            if eps is None:
                eps = torch.finfo(x.meta["val"].dtype).eps
            terms = _residual(x)
            # where the sum is, so that all who read it come later
            insert = Insertion(gm, norm if terms is None else x.next)
            value, residual = (x, None) if terms is None else terms
            inputs = (as_tokens(insert, value), None if residual is None else as_tokens(insert, residual))
            coding = _coding(node, source)
            insert.move_before(weight, bias, *coding)
            pair = insert.call(ops.norm_quantize.default, *inputs, weight, bias, eps, rms, *coding)
            if terms is not None:
                pattern = f"residual + {pattern}"
                total = shaped_as(insert, insert.call(operator.getitem, pair, 0), x)
                x.replace_all_uses_with(total)
            replace_node(quantize.node, shaped_as(insert, insert.call(operator.getitem, pair, 1), quantize.node))
            record_fusion(gm, norm, pattern)
    return gm


def fuse_rotations(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
        source = source_of(node)
        if source.rotate is None:
            continue
        pattern = "rotate + quantize"
        with recorded_skip(gm, source.rotate, pattern):
            read_quantizer(gm, node)
            gelu = same_tokens(source.x)
            exact = is_call(gelu, aten.gelu.default) and arguments(gelu)[1] == "none" and only_user(gelu) is not None
            insert = Insertion(gm, node)
            x = as_tokens(insert, same_tokens(args(gelu)[0])) if exact else source.x
            _, *qparams = _coding(node, source)
            replace_node(node, insert.call(ops.rotate_quantize.default, x, exact, *qparams))
            record_fusion(gm, source.rotate, f"GELU + {pattern}" if exact else pattern)
    return gm


def _coding(quantize: Node, source: Source) -> tuple[Any, ...]:
    """The arguments of an operator that quantizes as this node does: whether it rotates, and how codes are made."""
    _, inv_scale, zero_point, _, bits = args(quantize)
    return source.rotate is not None, inv_scale, zero_point, source.inv_smooth, bits


def _residual(x: Node) -> tuple[Node, Node] | None:
    """Branch and stream of a sum of two values of one shape."""
    if not is_call(x, aten.add.Tensor) or x.kwargs or not all(isinstance(term, Node) for term in args(x)):
        return None
    stream, branch = args(x)
    shapes = [term.meta["val"].shape for term in (stream, branch)]
    return (branch, stream) if shapes[0] == shapes[1] else None


def record_unfused(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
        record_fusion(gm, node, "quantize", f"its input comes from {same_tokens(args(node)[0]).target}")
    return gm


FUSE: tuple[Pass, ...] = (
    start_fusions,
    with_values,
    follow_device,
    drop_identities,
    FoldConstants(),
    add_stacked_sums,
    simplify_layouts,
    FoldConstants(),
    fuse_scans,
    fuse_gelus,
    fuse_norms,
    fuse_rotations,
    fuse_gates,
    pack_linears,
    simplify_layouts,
    record_unfused,
    drop_unused_tensors,
)
"""In this order: scans take the most operators, and what remains is packed."""
