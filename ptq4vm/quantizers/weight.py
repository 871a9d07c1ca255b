"""Quantizes weights."""

from typing import Any

import torch
from torch import Tensor, fx

from ptq4vm import ops
from ptq4vm.config import QuantConfig
from ptq4vm.graph.insert import replace_node
from ptq4vm.ops import quantization
from ptq4vm.quantization_specs import WeightGranularity
from ptq4vm.quantizers.base import FakeQuantize, constant, quantized_decomposed
from ptq4vm.quantizers.range_search import weight_scale


class WeightFakeQuantize(FakeQuantize):
    """A weight W (N, D), already smoothed, or a convolution's (N, …): symmetric, one scale for each output channel.

    The codes follow from W and its scale, unless GPTQ has chosen others.
    """

    RESULTS = ("scale", "codes")
    codes: Tensor | None
    """int8 (N, D), chosen by GPTQ."""

    def choose_qparams(self, w: Tensor, config: QuantConfig) -> None:
        """Sets the scale (N,) of w, all entries equal with `per_tensor_weights`."""
        w, search = w.flatten(1), config.range_search
        if config.weights.granularity is WeightGranularity.PER_TENSOR:
            self.scale = weight_scale(w.reshape(1, -1), self.spec, search).repeat(len(w))
        else:
            self.scale = weight_scale(w, self.spec, search)

    def quantized(self, w: Tensor, smooth: Tensor | None = None) -> Tensor:
        """Fake-quantizes w · smooth."""
        scale = self.learned_scale()
        if self.codes is not None:
            return self.codes * scale.unsqueeze(-1)
        # in one layout before and after conversion: products of transposed memory may round differently
        return ops.fake_quantize(w.contiguous().flatten(1), scale, None, smooth, self.spec.bits).view(w.shape)

    def integers(self, w: Tensor) -> Tensor:
        """Returns the int8 codes (N, D) of w, already smoothed."""
        if self.codes is not None:
            return self.codes
        scale = self.calculate_qparams()[0]
        return quantization.quantize_weight(w.contiguous().flatten(1), scale, self.spec.bits).view(w.shape)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replaces itself and the smoothing of the weight by integers and one dequantize node."""
        scale, zero_point = self.calculate_qparams()
        with torch.no_grad():
            integers = self.integers(constant(model, node.args[0]))
        values = {"weight_q": integers, "weight_scale": scale, "weight_zero_point": zero_point}
        with model.graph.inserting_before(node):
            arguments: Any = (*self._set_tensors(model, values), 0, *self.spec.bounds, torch.int8)
            result = model.graph.call_function(quantized_decomposed.dequantize_per_channel.default, arguments)
        replace_node(node, result)
