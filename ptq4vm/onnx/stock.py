"""Writes the nodes of the domain `ptq4vm` in stock operators of ONNX."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ptq4vm.onnx import quantization, scans
from ptq4vm.onnx.builder import Builder
from ptq4vm.onnx.calls import Call
from ptq4vm.onnx.quantization import Form
from ptq4vm.onnx.translate import DOMAIN

_Expansion = Callable[[Builder, Call, Form], list[ir.Value]]

_PRODUCTS = ("MatMul", "MatMulInteger")
"""Nodes that keep the name of their linear."""

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


def expand(model: ir.Model, form: Form) -> ir.Model:
    """Replaces every node of ours; a constant that several nodes have is kept once.

    Raises ValueError that names the operators without an expansion.
    """
    graph = model.graph
    calls = [Call(node) for node in graph if node.domain == DOMAIN]
    if missing := sorted({call.operator for call in calls} - set(EXPANSIONS)):
        names = ", ".join(f"{DOMAIN}::{name}" for name in missing)
        raise ValueError(f"stock ONNX has no form of {names}: export with runtime='custom', whose library has it")
    shared: dict[object, ir.Value] = {}
    for call in calls:
        node, builder = call.node, Builder(shared)
        results = EXPANSIONS[call.operator](builder, call, form)
        for old, new in zip(node.outputs, results, strict=True):
            new.shape, new.type = old.shape, new.type or old.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], builder.nodes, node.outputs, results)
    for i, constant in enumerate(shared.values()):
        constant.name = f"constant_{i}"
        graph.register_initializer(constant)
    RemoveUnusedNodesPass()(model)
    _retype_codes(graph, ir.DataType.INT8 if form.signed else ir.DataType.UINT8)
    _rename(graph)
    return model


def _rename(graph: ir.Graph) -> None:
    """Gives values short names that no other has, in the bodies of Scans too; what goes in and out keeps its own."""
    numbers = itertools.count()
    for each in (graph, *graph.subgraphs()):
        inner = () if each is graph else (*each.inputs, *each.initializers.values())
        made = (value for node in each for value in node.outputs if value not in graph.outputs)
        for value in (*inner, *made):
            value.name = f"v{next(numbers)}"
        for node in each:
            node.name = node.name if node.op_type in _PRODUCTS else None


def _retype_codes(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Gives codes that other operators move the type in which they are stored."""
    for node in graph:
        for value in node.outputs:
            if value.dtype is ir.DataType.INT8:
                value.dtype = dtype
