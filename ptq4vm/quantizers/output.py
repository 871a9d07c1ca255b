"""Quantizes the outputs of operators."""

from typing import Any

import torch
from torch import Tensor, fx

from ptq4vm import ops
from ptq4vm.config import QuantConfig
from ptq4vm.graph.insert import replace_node
from ptq4vm.quantization_specs import Granularity, IntegerRange
from ptq4vm.quantizers.base import FakeQuantize, laid_out_as
from ptq4vm.quantizers.clusters import Statistics

OUTPUT = "ptq4vm.output"
"""The key in the meta of a dequantize node that has taken an `OutputFakeQuantize`'s place; its name."""


class OutputFakeQuantize(FakeQuantize):
    """The output of an operator, symmetric; x (B, L, C), or channels first (B, C, H, W), or of any shape per tensor.

    Its scale is (1,), or has one entry for each token (L,) or channel (C,).
    """

    OBSERVATIONS = Statistics
    observations: Statistics

    def __init__(self, spec: IntegerRange, granularity: Granularity, axis: int, power_of_two: bool, **_: Any) -> None:
        super().__init__(spec)
        self.granularity = granularity
        self.axis = axis
        """Axis of the tokens or channels that the scale belongs to."""
        self.power_of_two = power_of_two

    def observe(self, x: Tensor) -> None:
        self.observations.add(x.detach(), self.axis)

    def choose_qparams(self, config: QuantConfig) -> None:
        statistics, search = self.observations, config.range_search
        if not torch.isfinite(statistics.largest).all():
            raise ValueError(f"{self.name}: it returns values that are not finite; check the checkpoint and the images")
        if self.granularity is Granularity.PER_TENSOR:
            self.scale = statistics.scale(self.spec, search)
        else:
            self.scale = statistics.clustered_scale(config.activations.clusters, self.spec, search, self.power_of_two)

    def quantized(self, x: Tensor) -> Tensor:
        scale, zero_point = self.calculate_qparams()
        if len(scale) == 1:
            return laid_out_as(x, ops.fake_quantize(x, scale, zero_point, None, self.spec.bits))
        scales = scale.view(-1, *[1] * (x.dim() - 1 - self.axis))
        one, none = torch.ones_like(scale[:1]), torch.zeros_like(zero_point[:1])
        codes = ops.fake_quantize(x * (1.0 / scales), one, none, None, self.spec.bits)
        return laid_out_as(x, codes * scales)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replaces itself by quantize and dequantize nodes; `lower` knows them by the name in their meta."""
        axis = None if len(self.calculate_qparams()[0]) == 1 else self.axis
        with model.graph.inserting_before(node):
            result = self._insert_integers(model, node, "output", axis)
        replace_node(node, result)
        result.meta[OUTPUT] = self.name
