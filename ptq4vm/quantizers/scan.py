"""Quantizes the hidden state of scans. Shapes: states h (L, S, E), of L tokens, S states, E channels."""

from typing import Any

import torch
from torch import Tensor, fx

from ptq4vm import ops
from ptq4vm.graph.insert import replace_node
from ptq4vm.ops import scans
from ptq4vm.quantization_specs import RangeSearch
from ptq4vm.quantizers.base import FakeQuantize
from ptq4vm.quantizers.clusters import symmetric_scale

STATE_IMAGES = 8
"""Images whose states are kept to score truncations, of the first batch."""


class StateStatistics:
    """The sum and the maximum of |h| over images, and |h| of a few."""

    def __init__(self) -> None:
        self.total = self.largest = self.sample = torch.zeros(())
        self.count = 0

    def add(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> None:
        """Adds the states of one batch, from the arguments of `ops.selective_scan`."""
        _, _, _, bias, softplus = rest
        sizes = torch.cat([states.abs() for states in scans.scan_states(u, delta, A, B, bias, softplus)])
        self.total = self.total + sizes.sum(1)
        self.count += sizes.shape[1]
        self.largest = torch.maximum(self.largest, sizes.amax(1))
        if not self.sample.dim():
            self.sample = sizes[:, :: max(1, sizes.shape[1] // STATE_IMAGES)].clone()


class ScanFakeQuantize(FakeQuantize):
    """`ops.selective_scan`, whose hidden state it rounds; its inputs are that operator's, its scale (1,) or (L,)."""

    OBSERVATIONS = StateStatistics
    observations: StateStatistics

    def observe(self, *inputs: Any) -> None:
        self.observations.add(*inputs)

    def choose_qparams(self, factors: Tensor, tokens: Tensor, per_token: bool, search: RangeSearch) -> None:
        """Sets the scale of the states (L, S, E) that are divided by `factors` (S, E).

        With `per_token` it is chosen for each token; else one is, and multiplied by r_L `tokens` (L,) or (1,).
        """
        states = self.observations
        if not per_token:
            factors = factors * tokens.view(-1, 1, 1)
        rows = len(states.total) if per_token else 1
        largest = (states.largest / factors).reshape(rows, -1).amax(1)
        sample = (states.sample / factors.unsqueeze(-3)).reshape(rows, -1)
        scale = symmetric_scale(sample, largest, self.spec, search)
        self.scale = scale if per_token else scale * tokens

    def original(self, *inputs: Any) -> Tensor:
        return ops.selective_scan(*inputs)

    def quantized(self, *inputs: Any) -> Tensor:
        assert self.scale is not None
        return ops.selective_scan_quantized(*inputs, self.scale, 1.0 / self.scale, self.spec.bits)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replaces itself by the operator."""
        scale = self.calculate_qparams()[0]
        values = {"state_scale": scale, "state_inv_scale": 1.0 / scale}
        with model.graph.inserting_before(node):
            arguments = (*node.args, *self._set_tensors(model, values), self.spec.bits)
            result = model.graph.call_function(ops.selective_scan_quantized.default, arguments)
        replace_node(node, result)
