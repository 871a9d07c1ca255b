"""Finds what is quantized in a prepared graph: linears, outputs, convolutions, scans."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import module_of
from ptq4vm.graph.sites import ConvolutionSite, LinearSite, sites_of
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
        """Returns what came to its input (…, D) when s was 1, as it comes now."""
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
    found = [(node, module_of(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [QuantizedOutput(fake.name, node, fake) for node, fake in found if isinstance(fake, OutputFakeQuantize)]


def quantized_scans(prepared: GraphModule) -> list[QuantizedScan]:
    """The scans of a prepared graph with a quantized state, in graph order."""
    found = [(node, module_of(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [QuantizedScan(fake.name, node, fake) for node, fake in found if isinstance(fake, ScanFakeQuantize)]


def convolution_weight(prepared: GraphModule, convolution: QuantizedConvolution) -> Tensor:
    """The weight (N, …) as its fake-quantizer sees it."""
    quantizer: Any = convolution.node.args[1]
    return constant(prepared, quantizer.args[0]).detach().float()


def quantized_convolutions(prepared: GraphModule) -> list[QuantizedConvolution]:
    """The convolutions of a prepared graph with a quantized weight, in graph order."""
    found = [(node, module_of(prepared, node.args[1])) for node in sites_of(prepared, ConvolutionSite)]
    return [QuantizedConvolution(fake.name, node, fake) for node, fake in found if isinstance(fake, WeightFakeQuantize)]


def quantized_linears(prepared: GraphModule) -> list[QuantizedLinear]:
    """Returns the quantized linears of a prepared graph, or of a piece of one, in graph order."""
    found: list[QuantizedLinear] = []
    for node, site in sites_of(prepared, LinearSite).items():
        x, w = (module_of(prepared, argument) for argument in node.args[:2])
        assert isinstance(x, ActivationFakeQuantize) and isinstance(w, WeightFakeQuantize), site.name
        smooth = None if site.log_smooth is None else prepared.get_parameter(site.log_smooth)
        found.append(QuantizedLinear(site.name, node, x, w, smooth, site.rotated))
    return found


def quantizer_settings(prepared: GraphModule) -> list[tuple[str, list[str]]]:
    """Returns the settings of a prepared graph's fake-quantizers, which calibration does not change, in graph order."""
    found = [(node.name, module_of(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [
        (name, [f"{key}={value}" for key, value in vars(fake).items() if key in _SETTINGS])
        for name, fake in found
        if fake is not None
    ]


_SETTINGS = ("spec", "name", "granularity", "float_token_index", "shares_qparams_with", "axis", "power_of_two")
