"""Checks a graph against the table of what one of its stage may hold."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm import ops


class GraphStage(enum.StrEnum):
    """Stages of a graph, by the numbers it computes with."""

    CAPTURED = "captured"
    """Floating point: the model as torch.export wrote it, and its canonical form."""
    PREPARED = "prepared"
    """Fake-quantizers, as modules."""
    QDQ = "qdq"
    """Floating point between quantize and dequantize nodes."""
    LOWERED = "lowered"
    """Integer operators."""
    FUSED = "fused"
    """Operators that quantize what they make, weights in the kernels' layout."""


_FLOAT = frozenset(("selective_scan", "causal_conv1d", "rotate", "fake_quantize"))
_QUANTIZED = _FLOAT | {"quantize", "dequantize", "choose_qparams", "selective_scan_quantized"}
_INTEGER = _QUANTIZED | {"linear"}
_EVERY = frozenset(schema.split("(", 1)[0] for schema in ops.SCHEMAS)


@dataclass(frozen=True)
class _Contents:
    """Contents that a stage allows, beside operators of other libraries, which are the model's own."""

    operators: frozenset[str]
    """Names of ours."""
    modules: bool = False
    """Fake-quantizers."""
    qdq: bool = False
    """Quantize and dequantize nodes of torchao."""
    traced: bool = False
    """Modules and methods too, as Dynamo traces them."""


CONTENTS: Mapping[GraphStage, _Contents] = {
    GraphStage.CAPTURED: _Contents(_FLOAT),
    GraphStage.PREPARED: _Contents(_FLOAT, modules=True),
    GraphStage.QDQ: _Contents(_QUANTIZED, qdq=True),
    GraphStage.LOWERED: _Contents(_INTEGER, qdq=True),
    GraphStage.FUSED: _Contents(_EVERY, qdq=True, traced=True),
}
"""Q/DQ pairs that no linear reads stay in lowered graphs."""


def is_lowered(gm: GraphModule) -> bool:
    """Returns whether a graph computes with integers."""
    integer = (ops.linear.default, ops.selective_scan_quantized.default)
    return any(gm.graph.find_nodes(op="call_function", target=target) for target in integer)


def verify(gm: GraphModule, stage: GraphStage, after: str) -> GraphModule:
    """Returns the graph; raises RuntimeError, which names the pass and the node, for what its stage does not have."""
    contents = CONTENTS[stage]
    for node in gm.graph.nodes:
        if (problem := _problem(gm, node, contents)) is not None:
            raise RuntimeError(f"{after} left {node.format_node()}, but {problem} in a graph that is {stage}")
    return gm


def _problem(gm: GraphModule, node: Node, contents: _Contents) -> str | None:
    if node.op in ("call_module", "call_method") and not contents.traced:
        quantizes = node.op == "call_module" and hasattr(gm.get_submodule(str(node.target)), "calculate_qparams")
        return None if contents.modules and quantizes else "such calls have no place"
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    name = target.name().partition("::")[2].partition(".")[0]
    foreign = target.namespace == "ptq4vm" and name not in contents.operators
    foreign |= target.namespace == "quantized_decomposed" and not contents.qdq
    return f"{target} has no place" if foreign else None
