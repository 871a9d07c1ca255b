"""The operators as ONNX Runtime's custom operators: a call runs a model of one node, and must return torch's bytes."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ptq4vm import ops
from ptq4vm.onnx.library import library

ONNX_TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6, torch.int64: 7,
    torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip


@cache
def arguments_of(name: str) -> list[tuple[str, str]]:
    """Returns type and name of every argument."""
    (schema,) = (schema for schema in ops.SCHEMAS if schema.startswith(f"{name}("))
    return [tuple(argument.split(" ")) for argument in re.match(r"\w+\((.*?)\)", schema)[1].split(", ")]


def model(
    name: str, values: Sequence[Any], results: Sequence[torch.dtype], fed: Callable[[int], bool] = lambda place: True
) -> tuple[bytes, dict[str, Any]]:
    """Returns a model of one node, and what it is fed: inputs that `fed` leaves out are constants of the model.

    numpy has no bfloat16: such values are float32 outside of the model.
    """
    from onnx import helper

    nodes, inputs, constants, names, feeds, attributes = [], [], [], [], {}, {}
    for place, ((kind, argument), value) in enumerate(zip(arguments_of(name), values, strict=True)):
        if not kind.startswith("Tensor"):
            attributes[argument] = ONNX_TYPES[value] if kind == "ScalarType" else value
            continue
        names.append("" if value is None else argument)
        if value is None:
            continue
        source, own = argument, value.dtype
        if own is torch.bfloat16:
            source, value = f"{argument}_float32", value.float()
            nodes.append(helper.make_node("Cast", [source], [argument], to=ONNX_TYPES[own]))
        array, number = value.contiguous().numpy(), ONNX_TYPES[value.dtype]
        if fed(place):
            inputs.append(helper.make_tensor_value_info(source, number, [None] * array.ndim))
            feeds[source] = array
        else:
            constants.append(helper.make_tensor(source, number, array.shape, array.tobytes(), raw=True))
    while not names[-1]:
        names.pop()
    outputs = []
    for place, dtype in enumerate(results):
        output = f"result{place}"
        if dtype is torch.bfloat16:
            nodes.append(helper.make_node("Cast", [output], [f"{output}_float32"], to=ONNX_TYPES[torch.float32]))
            output, dtype = f"{output}_float32", torch.float32
        outputs.append(helper.make_tensor_value_info(output, ONNX_TYPES[dtype], None))
    written = [f"result{place}" for place in range(len(results))]
    nodes.append(helper.make_node(name, names, written, domain="ptq4vm", **attributes))
    nodes.sort(key=lambda node: (node.op_type != "Cast" or node.input[0] in written, node.op_type == "Cast"))
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
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


class OnnxOperators:
    """Operators by name. Inputs whose places `fed` says are fed, others are constants."""

    def __init__(self, fed: Callable[[int], bool] = lambda place: True, threads: int = 1) -> None:
        self.fed, self.threads = fed, threads

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*values: Any) -> Tensor | tuple[Tensor, ...]:
            torch_results = getattr(torch.ops.ptq4vm, name)(*values)
            want = torch_results if isinstance(torch_results, tuple) else (torch_results,)
            serialized, feeds = model(name, values, [result.dtype for result in want], self.fed)
            have = session(serialized, self.threads).run(None, feeds)
            for ours, theirs in zip(have, want, strict=True):
                theirs = (theirs.float() if theirs.dtype is torch.bfloat16 else theirs).numpy()
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                assert (ours + 0).tobytes() == (theirs + 0).tobytes(), name  # a zero of either sign is a zero
            return torch_results

        return call
