"""Reparameterization of the scans' hidden state, so that one interval a step fits it (k-scaled paper).

h'[l, s, c] = h[l, s, c] / (r_C[c] · r_L[l] · r_D[s]) for channels c, tokens l and states s. The scan of u / r_C with
B / r_D and C · r_D has the states h / (r_C · r_D) and the result y / r_C, with the skip connection and the gate or
without; r_L is in the step sizes of the states, which may differ from token to token anyway. B and C come from x_proj,
whose rows take r_D for nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm.graph.insert import Insertion, aten, attribute
from ptq4vm.graph.sites import LinearSite, ScanSite, find_linears, sites_of
from ptq4vm.graph.token_order import token_map
from ptq4vm.ops import quantization
from ptq4vm.quantization_specs import Factors

CHANNELS, INVERSE_CHANNELS, B_FACTOR, C_FACTOR = "channel_factor", "inv_channel_factor", "B_factor", "C_factor"
"""Buffers beside a scan: r_C and 1 / r_C (E,), 1 / r_D and r_D (S,), which B and C are multiplied by."""

SMALLEST = 1e-4
"""The least factor, as a part of the largest. (The paper adds 1e-15 to each, and what u is divided by may be that.)"""


@dataclass(frozen=True)
class InsertFactors:
    """Multiplications by factors of one around each scan; with `integrate` those of B and C are of rows of weights.

    A factor that cannot be integrated, because B does not come from a linear as it is, is multiplied when the model
    runs.
    """

    integrate: bool

    def __call__(self, gm: GraphModule) -> GraphModule:
        owners = find_linears(gm) if self.integrate else {}
        for node, site in sites_of(gm, ScanSite).items():
            insert = Insertion(gm, node)
            u, delta, A, B, C, *rest = node.args
            channels, states = (int(size) for size in A.meta["val"].shape)  # type: ignore[union-attr]
            inverse = insert.tensor(f"{site.name}.{INVERSE_CHANNELS}", torch.ones(channels))
            mixing = [
                _multiplied(insert, value, f"{site.name}.{leaf}", states, owners)
                for value, leaf in ((B, B_FACTOR), (C, C_FACTOR))
            ]
            node.args = (insert.call(aten.mul.Tensor, u, inverse), delta, A, *mixing, *rest)
            after = Insertion(gm, node.next)
            product = after.call(aten.mul.Tensor, node, after.tensor(f"{site.name}.{CHANNELS}", torch.ones(channels)))
            for user in [user for user in node.users if user is not product]:
                user.replace_input_with(node, product)
        return gm


def _multiplied(insert: Insertion, value: Any, name: str, states: int, owners: Mapping[Node, LinearSite]) -> Any:
    """B or C (B, L, S) times a buffer (S,), or made by a weight whose rows are multiplied by it."""
    found = token_map(value)
    if found is None or found.source not in owners or len(found.source.args) > 2:
        return insert.call(aten.mul.Tensor, value, insert.tensor(name, torch.ones(states)))
    linear = found.source
    before = Insertion(insert.gm, linear)
    x, weight = linear.args
    around = [found.first, owners[linear].out_features - found.last]
    rows = before.call(aten.constant_pad_nd.default, before.tensor(name, torch.ones(states)), around, 1.0)
    factor = before.call(aten.unsqueeze.default, rows, 1)
    linear.args = (x, before.call(aten.mul.Tensor, weight, factor))
    return value


def set_factors(gm: GraphModule, name: str, channels: Tensor, states: Tensor) -> None:
    """Gives the scan of that name r_C and r_D, in place."""
    values = {CHANNELS: channels, INVERSE_CHANNELS: 1 / channels, B_FACTOR: 1 / states, C_FACTOR: states}
    for leaf, value in values.items():
        attribute(gm, f"{name}.{leaf}").copy_(value)


def determine_factors(factors: Factors, mean: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r_C (E,), r_L (L,), r_D (S,) from the mean and the maximum over images of |h|, both (L, S, E).

    MAXIMA: the largest |h| of each channel; then, divided by that, of each state; then of each token.
    POWERS: r_* = R_*^p_*, where R_* is the mean over the two other axes and p_* its standard deviation's share of the
    three.
    """
    if factors is Factors.MAXIMA:
        channels = _bounded(largest.amax((0, 1)))
        left = largest / channels
        states = _bounded(left.amax((0, 2)))
        return channels, _bounded((left / states.unsqueeze(1)).amax((1, 2))), states
    means = mean.mean((0, 1)), mean.mean((1, 2)), mean.mean((0, 2))
    spread = torch.stack([value.std(correction=0) for value in means])
    shares = spread / spread.sum().clamp(min=quantization.EPSILON)
    channels, tokens, states = (_bounded(value.pow(share)) for value, share in zip(means, shares, strict=True))
    return channels, tokens, states


def _bounded(values: Tensor) -> Tensor:
    """Factors to divide by, of states that stay zero too."""
    largest = values.amax()
    return torch.where(largest > 0, values.clamp(min=SMALLEST * largest), 1.0)
