"""Finds what is quantized in a prepared graph: linears, outputs, convolutions, scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.sites import CONVOLUTIONS
from ptq4vm.quantizers import (
    ActivationFakeQuantize,
    OutputFakeQuantize,
    ScanFakeQuantize,
    WeightFakeQuantize,
    constant,
)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One linear of a prepared graph with its two fake-quantizers and, if there is one, its smoothing vector."""

    name: str
    node: Node
    input: ActivationFakeQuantize
    weight: WeightFakeQuantize
    smooth: torch.nn.Parameter | None
    """log s (D,)"""
    rotated: bool
    """Whether x / s and W · s are rotated."""

    def smoothed(self, x: Tensor) -> Tensor:
        """What has come to its input (…, D) when s was 1, as it comes now."""
        if self.smooth is None:
            return x
        inverse = self.smooth.detach().exp().reciprocal()
        return ops.rotate(ops.rotate(x) * inverse) if self.rotated else x * inverse


@dataclass(frozen=True, slots=True)
class QuantizedOutput:
    """A value of a prepared graph that is quantized where it is made."""

    name: str
    node: Node
    """The fake-quantizer's."""
    fake: OutputFakeQuantize


@dataclass(frozen=True, slots=True)
class QuantizedConvolution:
    """A convolution of a prepared graph with its weight's fake-quantizer."""

    name: str
    node: Node
    weight: WeightFakeQuantize


@dataclass(frozen=True, slots=True)
class QuantizedScan:
    """A scan of a prepared graph with a quantized state."""

    name: str
    node: Node
    fake: ScanFakeQuantize


def quantized_outputs(prepared: GraphModule) -> list[QuantizedOutput]:
    """The values of a prepared graph that are quantized where they are made, in graph order."""
    found = [(node, _module(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [QuantizedOutput(fake.name, node, fake) for node, fake in found if isinstance(fake, OutputFakeQuantize)]


def quantized_scans(prepared: GraphModule) -> list[QuantizedScan]:
    """The scans of a prepared graph with a quantized state, in graph order."""
    found = [(node, _module(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [QuantizedScan(fake.name, node, fake) for node, fake in found if isinstance(fake, ScanFakeQuantize)]


def convolution_weight(prepared: GraphModule, convolution: QuantizedConvolution) -> Tensor:
    """The weight (N, …) as its fake-quantizer sees it."""
    quantizer: Any = convolution.node.args[1]
    return constant(prepared, quantizer.args[0]).detach().float()


def quantized_convolutions(prepared: GraphModule) -> list[QuantizedConvolution]:
    """The convolutions of a prepared graph with a quantized weight, in graph order."""
    nodes = [node for node in prepared.graph.nodes if node.target in CONVOLUTIONS]
    found = [(node, _module(prepared, node.args[1])) for node in nodes]
    return [QuantizedConvolution(fake.name, node, fake) for node, fake in found if isinstance(fake, WeightFakeQuantize)]


def quantized_linears(prepared: GraphModule, names: Sequence[str]) -> list[QuantizedLinear]:
    """The linears of a prepared graph, in graph order, under the names that `prepare` gave them."""
    found: list[QuantizedLinear] = []
    for node in prepared.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        quantizers = [_module(prepared, arg) for arg in node.args[:2]]
        x, w = quantizers
        if isinstance(x, ActivationFakeQuantize) and isinstance(w, WeightFakeQuantize):
            found.append(QuantizedLinear(names[len(found)], node, x, w, *_before(prepared, node)))
    assert len(found) == len(names), f"{len(found)} quantized linears for {len(names)} names"
    return found


def quantizer_settings(prepared: GraphModule) -> list[tuple[str, list[str]]]:
    """What was decided about the fake-quantizers of a prepared graph before calibration, in graph order."""
    found = [(node.name, _module(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [
        (name, [f"{key}={value}" for key, value in vars(fake).items() if key in _SETTINGS])
        for name, fake in found
        if fake is not None
    ]


_SETTINGS = ("spec", "name", "granularity", "float_token_index", "shares_qparams_with", "axis", "power_of_two")


def _module(gm: GraphModule, node: object) -> object:
    return gm.get_submodule(str(node.target)) if isinstance(node, Node) and node.op == "call_module" else None


def _before(gm: GraphModule, linear: Node) -> tuple[torch.nn.Parameter | None, bool]:
    """log s and whether x is rotated: x → mul(x, reciprocal(exp(log s))) (→ rotate) → fake-quantizer → linear."""
    observer: Any = linear.args[0]
    value: Any = observer.args[0]
    rotated = isinstance(value, Node) and value.target is ops.rotate.default
    product = value.args[0] if rotated else value
    if not (isinstance(product, Node) and product.target is torch.ops.aten.mul.Tensor):
        return None, rotated
    inverse = product.args[1]
    if not (isinstance(inverse, Node) and inverse.target is torch.ops.aten.reciprocal.default):
        return None, rotated
    scale = inverse.args[0]
    assert isinstance(scale, Node) and isinstance(scale.args[0], Node)
    return gm.get_parameter(str(scale.args[0].target)), rotated
