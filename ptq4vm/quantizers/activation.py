"""Quantizes the inputs of linears."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ptq4vm import ops
from ptq4vm.config import QuantConfig
from ptq4vm.graph.insert import Insertion, replace_node
from ptq4vm.ops import quantization
from ptq4vm.quantization_specs import Granularity, IntegerRange
from ptq4vm.quantizers.base import FakeQuantize, laid_out_as
from ptq4vm.quantizers.clusters import Statistics, symmetric_scale
from ptq4vm.quantizers.range_search import input_qparams


class ActivationFakeQuantize(FakeQuantize):
    """The input x (B, L, D) of linears, affine, at the config's granularity; one token may stay in floating point."""

    RESULTS = ("scale", "zero_point")
    zero_point: Tensor | None
    observations: list[Tensor]
    """Every batch of x, as it comes, without smoothing."""

    def __init__(
        self, spec: IntegerRange, granularity: Granularity, float_token_index: int | None = None, **_: Any
    ) -> None:
        super().__init__(spec)
        self.granularity = granularity
        self.float_token_index = float_token_index
        self.shares_qparams_with: str | None = None
        """Name of the `OutputFakeQuantize` whose scale serves this input too."""

    @property
    def dynamic(self) -> bool:
        return self.granularity is Granularity.PER_TOKEN_DYNAMIC

    @property
    def per_token(self) -> bool:
        """Whether its qparams are a table with those of every token."""
        return self.shares_qparams_with is None and self.granularity.static_per_token

    def observe(self, x: Tensor) -> None:
        self.observations.append(x.detach())

    def set_qparams(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Sets a static scale (float32) and zero point (int32, zeros if None), each (L,) or, per tensor, (1,)."""
        self.scale = scale
        self.zero_point = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point

    def choose_qparams(self, x: Tensor, config: QuantConfig) -> None:
        """Sets the static qparams of x (B, L, D), which are its observations, smoothed."""
        if self.dynamic:
            return
        if (kept := self.float_token_index) is not None and self.granularity is Granularity.PER_TENSOR:
            x = torch.cat((x[:, :kept], x[:, kept + 1 :]), 1)
        if self.granularity is Granularity.K_SCALED_CHANNEL:  # the scales of channels have taken the place of smoothing
            self.set_qparams(torch.ones(1))
        elif not config.activations.symmetric:
            self.set_qparams(*input_qparams(x, self.spec, self.granularity, config.range_search))
        elif self.granularity is Granularity.K_SCALED_TOKEN:
            statistics, search = Statistics.of(x, 1), config.range_search
            self.set_qparams(
                statistics.clustered_scale(config.activations.clusters, self.spec, search, config.power_of_two)
            )
        else:
            per_token = self.granularity is Granularity.PER_TOKEN
            rows = x.transpose(0, 1).flatten(1) if per_token else x.reshape(1, -1)
            self.set_qparams(symmetric_scale(rows, rows.abs().amax(1), self.spec, config.range_search))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        assert self.scale is not None and self.zero_point is not None
        return self.scale, self.zero_point

    def quantized(self, x: Tensor, smooth: Tensor | None = None) -> Tensor:
        """Fake-quantizes x · smooth."""
        if self.dynamic:
            x, smooth = self.original(x, smooth), None
            scale, zero_point = quantization.choose_qparams(x.detach(), None, self.spec.bits)
        else:
            scale, zero_point = self.learned_scale(), self.calculate_qparams()[1]
        y = ops.fake_quantize(x, scale, zero_point, smooth, self.spec.bits)
        if (kept := self.float_token_index) is not None:
            y = torch.slice_scatter(y, self.original(x[:, kept : kept + 1], smooth), 1, kept, kept + 1)
        return laid_out_as(x, y)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replaces itself by quantize and dequantize nodes (torchao calls this from `convert_pt2e`)."""
        graph, x, bits = model.graph, node.args[0], self.spec.bits
        with graph.inserting_before(node):
            if self.dynamic:
                pair = graph.call_function(ops.choose_qparams.default, (x, None, bits))
                scale, zero_point = (graph.call_function(operator.getitem, (pair, index)) for index in (0, 1))
                inverse = graph.call_function(torch.ops.aten.reciprocal.default, (scale,))
                codes = graph.call_function(ops.quantize.default, (x, inverse, zero_point, None, bits))
                result = graph.call_function(ops.dequantize.default, (codes, scale, zero_point))
            else:
                result = self._insert_integers(model, node, "input", 1 if self.per_token else None)
            if (kept := self.float_token_index) is not None:
                where = (1, kept, kept + 1)
                row = Insertion(model, node).call(torch.ops.aten.slice.Tensor, x, *where)
                result = graph.call_function(torch.ops.aten.slice_scatter.default, (result, row, *where))
        replace_node(node, result)
