"""Translates a graph to ONNX in which every operator of ours is one node of the domain `ptq4vm`.

torch.onnx knows the operators of PyTorch. Ours go through it as nodes with the operator's name, its tensors as inputs
in the schema's order, and its numbers as attributes by the schema's names.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vm.graph.capture import check_input
from ptq4vm.graph.pipeline import clean_up
from ptq4vm.passes.lower.fold import FoldConstants, drop_unused_tensors
from ptq4vm.quantizers import quantized_decomposed
from ptq4vm.serialization.recorded_values import example_inputs

DOMAIN = "ptq4vm"
OPSET = 21
BATCH = "batch"
DEQUANTIZE_WEIGHT = quantized_decomposed.dequantize_per_channel.default
"""What stays of torchao's operators in lowered graphs: weights in floating point that are saved as integers."""

_DTYPES = {torch.int8: 3, torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}


def translate(gm: GraphModule) -> ir.Model:
    """Returns the graph as an ONNX model of opset 21 with a dynamic batch.

    Raises ValueError that names the operator which ONNX has no words for.
    """
    copied = _symbolic(gm)
    examples = example_inputs(gm, 2)
    shapes = tuple({0: torch.export.Dim(BATCH)} if isinstance(x, Tensor) and x.dim() else None for x in examples)
    nodes = copied.graph.find_nodes(op="placeholder")
    names = [node.name for node, x in zip(nodes, examples, strict=True) if isinstance(x, Tensor)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(copied, examples, dynamic_shapes=shapes)
        try:
            exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET, optimize=True)
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(_reason(error)) from error
    assert exported is not None
    model = exported.model
    _name_values(model, names)
    return model


def _symbolic(gm: GraphModule) -> GraphModule:
    """Copies a graph, without checks of inputs, and with operators of ours as nodes that torch.onnx hands on."""
    gm = copy.deepcopy(gm).cpu().eval()
    gm = drop_unused_tensors(FoldConstants(keep=(DEQUANTIZE_WEIGHT,))(gm))
    for node in list(gm.graph.nodes):
        if node.target is check_input:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif getattr(node.target, "namespace", None) == DOMAIN or node.target is DEQUANTIZE_WEIGHT:
            node.target = _Symbolic(node.target)
    return clean_up(gm)


class _Symbolic:
    """Calls an operator for the types and shapes of its results, and returns those of an ONNX node."""

    def __init__(self, operator: Any) -> None:
        self.operator, self.__name__ = operator, operator._schema.name.partition("::")[2]
        self.__qualname__, self.__module__ = self.__name__, __name__

    def __call__(self, *args: Any) -> Any:
        tensors: list[Tensor | None] = []
        numbers: dict[str, Any] = {}
        for argument, value in zip(self.operator._schema.arguments, args, strict=False):
            if value is None or isinstance(value, Tensor):
                tensors.append(value)
            else:
                numbers[argument.name] = _DTYPES[value] if isinstance(value, torch.dtype) else _number(value)
        results = self.operator(*args)
        several = isinstance(results, tuple)
        made = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{self.__name__}",
            tensors,
            numbers,
            dtypes=[result.dtype for result in (results if several else (results,))],
            shapes=[result.shape for result in (results if several else (results,))],
            version=1,
        )
        return tuple(made) if several else made[0]


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, bool) else value


def _reason(error: BaseException) -> str:
    reasons = [error]
    while cause := reasons[-1].__cause__ or reasons[-1].__context__:
        reasons.append(cause)
    for reason in reasons:
        found = re.search(
            r"target=torch\.ops\.([\w.]+)|No ONNX function found for <OpOverload\(op='([\w.]+)", str(reason)
        )
        if found:
            name = found[1] or found[2]
            return f"ONNX has no translation of {name}, an operator of the model: write the model without it"
    return f"torch.onnx cannot export the model: {str(reasons[-1]).strip().splitlines()[0]}"


def _name_values(model: ir.Model, names: list[str]) -> None:
    """Names inputs, outputs and the batch."""
    graph = model.graph
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    for i, value in enumerate(graph.outputs):
        value.name = f"output_{i}" if len(graph.outputs) > 1 else "output"
    symbols = {str(value.shape[0]) for value in graph.inputs if value.shape}
    made = (value for node in graph for value in (*node.outputs, *node.inputs) if value is not None)
    for value in {id(value): value for value in (*graph.inputs, *made)}.values():
        _name_batch(value, symbols)


def _name_batch(value: ir.Value, symbols: set[str]) -> None:
    if value.shape is None:
        return
    sizes = [size if isinstance(size, int) else (BATCH if str(size) in symbols else None) for size in value.shape]
    value.shape = ir.Shape(sizes)
