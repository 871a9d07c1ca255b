"""ONNX files of single operators, and ONNX Runtime to run them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from ptq4vm.onnx.quantization import Form
from ptq4vm.onnx.stock import expand
from ptq4vm.onnx.tidy import tidy
from ptq4vm.onnx.translate import BATCH, DOMAIN, OPSET

FORMS = {"portable": Form(), "onnxruntime": Form(matmul_integer=True), "tensorrt": Form(signed=True)}


def session(model: ir.Model | str | Path, threads: int = 1, library: Path | None = None, optimize: bool = True) -> Any:
    """Returns a session; without `optimize` each node is computed as ONNX defines it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # without VNNI, products of two int8 codes would saturate
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library is not None:
        options.register_custom_ops_library(str(library))
    source = str(model) if isinstance(model, str | Path) else ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def one_node(name: str, args: tuple[Any, ...], computed: tuple[str, ...], form: Form) -> ir.Model:
    """Returns a call of an operator of ours in stock operators; tensors not `computed` are constants."""
    operator = getattr(torch.ops.ptq4vm, name).default
    inputs, values, numbers = [], [], {}
    for argument, value in zip(operator._schema.arguments, args, strict=True):
        if isinstance(value, Tensor):
            made = ir.val(argument.name, const_value=ir.tensor(value.numpy(), name=argument.name))
            if argument.name in computed:
                made = ir.val(argument.name, ir.tensor(_stored(value, form)).dtype, [BATCH, *value.shape[1:]])
                inputs.append(made)
            values.append(made)
        elif value is None:
            values.append(None)
        else:
            numbers[argument.name] = 1 if isinstance(value, torch.dtype) else int(value)
    results = operator(*args)
    results = results if isinstance(results, tuple) else (results,)
    outputs = [ir.val(f"y{i}", ir.tensor(y.numpy()).dtype, [BATCH, *y.shape[1:]]) for i, y in enumerate(results)]
    node = ir.node(name, values, numbers, domain=DOMAIN, outputs=outputs)
    constants = [value for value in values if value is not None and value.const_value is not None]
    graph = ir.Graph(
        inputs, outputs, nodes=[node], initializers=constants, opset_imports={"": OPSET, DOMAIN: 1}, name="g"
    )
    return tidy(expand(ir.Model(graph, ir_version=10), form))


def run_node(
    name: str, args: tuple[Any, ...], computed: tuple[str, ...] = ("x",), runtime: str = "portable"
) -> list[np.ndarray]:
    """Returns what ONNX Runtime computes for a call of an operator of ours, codes as they are in PyTorch."""
    operator = getattr(torch.ops.ptq4vm, name).default
    names = [argument.name for argument in operator._schema.arguments]
    form = FORMS[runtime]
    feeds = {each: _stored(args[names.index(each)], form) for each in computed}
    # of float32 codes, ONNX Runtime would choose others
    results = session(one_node(name, args, computed, form), optimize=not form.signed).run(None, feeds)
    return [result - np.float32(128) if result.dtype == np.uint8 else result for result in results]


def _stored(x: Tensor, form: Form) -> np.ndarray:
    """Returns a tensor's numbers; codes as operators of a file take them."""
    if x.dtype is not torch.int8:
        return x.numpy()
    return x.float().numpy() if form.signed else (x.int() + 128).numpy().astype(np.uint8)
