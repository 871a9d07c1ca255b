"""Finds what is quantized in a prepared graph: linears, outputs, convolutions, scans."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import module_of
from ptq4vm.graph.sites import ConvolutionSite, LinearSite, sites_of
from ptq4vm.quantizers import (
    ActivationFakeQuantize,
    FakeQuantize,
    OutputFakeQuantize,
    ScanFakeQuantize,
    WeightFakeQuantize,
    constant,
)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One linear of a prepared graph with its two fake-quantizers and, if there is one, its smoothing vector."""

    site: LinearSite
    node: Node
    input: ActivationFakeQuantize
    weight: WeightFakeQuantize
    smooth: torch.nn.Parameter | None
    """log s (D,)"""

    @property
    def name(self) -> str:
        return self.site.name

    def smoothed(self, x: Tensor) -> Tensor:
        """Returns what came to its input (…, D) when s was 1, as it comes now."""
        if self.smooth is None:
            return x
        inverse = self.smooth.detach().exp().reciprocal()
        return ops.rotate(ops.rotate(x) * inverse) if self.site.rotated else x * inverse


_Fake = TypeVar("_Fake", bound=FakeQuantize)


@dataclass(frozen=True, slots=True)
class QuantizedNode(Generic[_Fake]):
    """A quantized output, a scan with a quantized state, or a convolution with a quantized weight."""

    node: Node
    """The fake-quantizer's, which a scan's replaces; or the convolution."""
    fake: _Fake

    @property
    def name(self) -> str:
        return self.fake.name


QuantizedOutput = QuantizedNode[OutputFakeQuantize]
QuantizedScan = QuantizedNode[ScanFakeQuantize]
QuantizedConvolution = QuantizedNode[WeightFakeQuantize]


def quantized_outputs(prepared: GraphModule) -> list[QuantizedOutput]:
    """Returns the values of a prepared graph that are quantized where they are made, in graph order."""
    return _calls(prepared, OutputFakeQuantize)


def quantized_scans(prepared: GraphModule) -> list[QuantizedScan]:
    """Returns the scans of a prepared graph with a quantized state, in graph order."""
    return _calls(prepared, ScanFakeQuantize)


def _calls(prepared: GraphModule, kind: type[_Fake]) -> list[QuantizedNode[_Fake]]:
    found = [(node, module_of(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [QuantizedNode(node, fake) for node, fake in found if isinstance(fake, kind)]


def quantized_convolutions(prepared: GraphModule) -> list[QuantizedConvolution]:
    """Returns the convolutions of a prepared graph with a quantized weight, in graph order."""
    found = [(node, module_of(prepared, node.args[1])) for node in sites_of(prepared, ConvolutionSite)]
    return [QuantizedNode(node, fake) for node, fake in found if isinstance(fake, WeightFakeQuantize)]


def weight_of(quantized: QuantizedLinear | QuantizedConvolution) -> Tensor:
    """Returns the weight (N, …) of a linear or a convolution as its fake-quantizer sees it: smoothed, float32."""
    quantizer: Any = quantized.node.args[1]
    gm = quantized.node.graph.owning_module
    assert gm is not None
    return constant(gm, quantizer.args[0]).detach().float()


def quantized_linears(prepared: GraphModule) -> list[QuantizedLinear]:
    """Returns the quantized linears of a prepared graph, or of a piece of one, in graph order."""
    found: list[QuantizedLinear] = []
    for node, site in sites_of(prepared, LinearSite).items():
        x, w = (module_of(prepared, argument) for argument in node.args[:2])
        assert isinstance(x, ActivationFakeQuantize) and isinstance(w, WeightFakeQuantize), site.name
        smooth = None if site.log_smooth is None else prepared.get_parameter(site.log_smooth)
        found.append(QuantizedLinear(site, node, x, w, smooth))
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
