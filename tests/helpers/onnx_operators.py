"""The operators as ONNX Runtime's custom operators: a call runs a model of one node, and must return torch's bytes."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq4vm import ops
from ptq4vm.onnx import library

ONLY_TORCH = {"selective_scan_backward", "causal_conv1d_backward", "fake_quantize", "fake_quantize_backward"}
"""Operators that no fused graph holds."""

ONNX_TYPES = {
    torch.float32: (1, "float"), torch.uint8: (2, "uint8"), torch.int8: (3, "int8"), torch.int16: (5, "int16"),
    torch.int32: (6, "int32"), torch.int64: (7, "int64"), torch.float16: (10, "float16"), torch.float64: (11, "double"),
    torch.bfloat16: (16, "bfloat16"),
}  # fmt: skip

Fed = Callable[[int], bool]
"""Whether the argument at a place is fed; other inputs are constants of the model."""

FED: dict[str, Fed] = {
    "all": lambda place: True, "the first": lambda place: place == 0, "every other": lambda place: place % 2 == 0
}  # fmt: skip


@cache
def schema_of(name: str) -> tuple[list[list[str]], int]:
    """Returns type and name of every argument, and how many results there are."""
    (schema,) = (schema for schema in ops.SCHEMAS if schema.startswith(f"{name}("))
    arguments, results = schema.split(" -> ")
    inside = arguments.removeprefix(f"{name}(").removesuffix(")")
    return [argument.split(" ") for argument in inside.split(", ")], len(re.findall("Tensor", results))


def is_representable(name: str, values: Sequence[Any]) -> bool:
    """Whether a call can be a model: dense numbers of a CPU, not very many, of types that numpy or a cast makes."""
    for (kind, _), value in zip(schema_of(name)[0], values, strict=True):
        if isinstance(value, Tensor):
            dense = value.device.type == "cpu" and value.layout is torch.strided and not value.requires_grad
            if not dense or value.dtype not in ONNX_TYPES or max(value.numel(), 0, *value.shape) > 2**20:
                return False
        elif kind == ("Tensor" if value is None else "ScalarType") and value not in ONNX_TYPES:
            return False
    return True


def model(name: str, values: Sequence[Any], fed: Fed = FED["all"], **left_out: str) -> tuple[bytes, dict[str, Any]]:
    """Returns a model of one node, and what it is fed.

    Its outputs are the results, whose types are left to the library, and the same as float64. numpy has no bfloat16:
    such inputs are fed as float32. `left_out` maps results to other names.
    """
    from onnx import helper

    before, inputs, constants, names, feeds, attributes = [], [], [], [], {}, {}
    arguments, results = schema_of(name)
    for place, ((kind, argument), value) in enumerate(zip(arguments, values, strict=True)):
        if not kind.startswith("Tensor"):
            attributes[argument] = ONNX_TYPES[value][0] if kind == "ScalarType" else value
            continue
        names.append("" if value is None else argument)
        if value is None:
            continue
        source = argument
        if value.dtype is torch.bfloat16:
            source, value = f"{argument}_float32", value.float()
            before.append(helper.make_node("Cast", [source], [argument], to=ONNX_TYPES[torch.bfloat16][0]))
        array, number = value.contiguous().numpy(), ONNX_TYPES[value.dtype][0]
        if fed(place):
            inputs.append(helper.make_tensor_value_info(source, number, [None] * array.ndim))
            feeds[source] = array
        else:
            constants.append(helper.make_tensor(source, number, array.shape, array.tobytes(), raw=True))
    while names and not names[-1]:
        names.pop()
    written = [left_out.get(f"result{place}", f"result{place}") for place in range(results)]
    node = helper.make_node(name, names, written, domain="ptq4vm", **attributes)
    kept = [result for result in written if result]
    after = [helper.make_node("Cast", [r], [f"{r}_float64"], to=ONNX_TYPES[torch.float64][0]) for r in kept]
    outputs = [*map(helper.make_empty_tensor_value_info, kept)]
    outputs += [helper.make_tensor_value_info(f"{r}_float64", ONNX_TYPES[torch.float64][0], None) for r in kept]
    graph = helper.make_graph([*before, node, *after], name, inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ptq4vm", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), feeds


def session(serialized: bytes, threads: int = 1) -> Any:
    """Loads a model with the library of operators."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised
    options.register_custom_ops_library(str(library()))
    return onnxruntime.InferenceSession(serialized, options)


def run(loaded: Any, feeds: dict[str, Any]) -> list[np.ndarray]:
    """Returns the results as float64."""
    return loaded.run([out.name for out in loaded.get_outputs() if out.name.endswith("_float64")], feeds)


def assert_same(ours: Sequence[np.ndarray], theirs: Tensor | Sequence[Tensor]) -> None:
    """But for the sign of zeros, which the division of a quantized scan's work may change."""
    for a, b in zip(ours, [theirs] if isinstance(theirs, Tensor) else theirs, strict=True):
        assert a.shape == b.shape and (a + 0).tobytes() == (b.double().numpy() + 0).tobytes()


class OnnxOperators:
    """Operators by name, which run here and return what torch's return."""

    def __init__(self, fed: Fed = FED["all"], threads: int = 1) -> None:
        self.fed, self.threads = fed, threads

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            serialized, feeds = model(name, values, self.fed)
            loaded = session(serialized, self.threads)
            results = getattr(torch.ops.ptq4vm, name)(*values)
            assert_same(run(loaded, feeds), results)
            types = [
                f"tensor({ONNX_TYPES[x.dtype][1]})" for x in ([results] if isinstance(results, Tensor) else results)
            ]
            assert [out.type for out in loaded.get_outputs()[: len(types)]] == types
            return results

        return call
