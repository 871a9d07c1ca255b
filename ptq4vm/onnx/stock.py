"""Writes the nodes of the domain `ptq4vm` in stock operators of ONNX."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ptq4vm.onnx import quantization, scans
from ptq4vm.onnx.builder import Builder, Constants
from ptq4vm.onnx.calls import Call
from ptq4vm.onnx.quantization import Form
from ptq4vm.onnx.translate import DOMAIN

_Expansion = Callable[[Builder, Call, Form], list[ir.Value]]

_OF_TORCHAO = ("dequantize_per_channel",)
"""Operators of torchao's that lowered graphs hold, which come here as ours do."""

EXPANSIONS: dict[str, _Expansion] = {
    "causal_conv1d": scans.causal_conv1d,
    "choose_qparams": quantization.choose_qparams,
    "dequantize": quantization.dequantize,
    "dequantize_per_channel": quantization.dequantize_weight,
    "linear": quantization.linear,
    "quantize": quantization.quantize,
    "rotate": quantization.rotate,
    "selective_scan": scans.selective_scan,
    "selective_scan_quantized": scans.selective_scan_quantized,
}


def expand(model: ir.Model, form: Form | None) -> ir.Model:
    """Replaces the nodes of ours; a constant that several nodes have is kept once.

    Without a form only those that our library does not have either. Raises ValueError that names the operators that
    stock ONNX has no form of.
    """
    graph = model.graph
    calls = [Call(node) for node in graph if node.domain == DOMAIN and (form or node.op_type in _OF_TORCHAO)]
    if missing := sorted({call.operator for call in calls} - set(EXPANSIONS)):
        names = ", ".join(f"{DOMAIN}::{name}" for name in missing)
        raise ValueError(f"stock ONNX has no form of {names}: export with runtime='custom', whose library has it")
    shared = Constants()
    for call in calls:
        node, builder = call.node, Builder(shared)
        results = EXPANSIONS[call.operator](builder, call, form or Form())
        for old, new in zip(node.outputs, results, strict=True):
            new.shape, new.type = old.shape, new.type or old.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], builder.nodes, node.outputs, results)
    for i, constant in enumerate(shared.known.values()):
        constant.name = f"constant_{i}"
        graph.register_initializer(constant)
    if form:
        _retype_codes(graph, ir.DataType.FLOAT if form.signed else ir.DataType.UINT8)
    return model


def _retype_codes(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Gives codes that other operators move the type in which they are stored."""
    for node in graph:
        for value in node.outputs:
            if value.dtype is ir.DataType.INT8:
                value.dtype = dtype
