"""Reparameterization of the scans' hidden state, so that one interval fits it (k-scaled paper).

h'[l, s, c] = h[l, s, c] / (r_C[c] · r_L[l] · r_D[s]) for channels c, tokens l and states s. The scan of u / r_C with
B / r_D and C · r_D has the states h / (r_C · r_D) and the result y / r_C, with the skip connection and the gate or
without; r_L is in the step sizes of the states, which may differ from token to token anyway. B and C come from x_proj,
whose rows take r_D for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm.graph import Insertion, LinearSite, aten, attribute, has_attribute, set_tensor
from ptq4vm.passes.tokens import token_map
from ptq4vm.quantizer import FIRST_ROWS, QuantizedScan, ScanSite

CHANNELS, INVERSE_CHANNELS, B_FACTOR, C_FACTOR = "channel_factor", "inv_channel_factor", "B_factor", "C_factor"
"""Buffers beside a scan: r_C (E,), 1 / r_C, and what B and C are multiplied by, (S,) or for rows of a weight (N, 1)."""

SMALLEST = 1e-15
"""Added to every factor, as in the paper."""


def insert_factors(
    gm: GraphModule, scans: Sequence[ScanSite], linears: Sequence[LinearSite], integrate: bool
) -> GraphModule:
    """Multiplications by factors of one around each scan; with `integrate` those of B and C are of rows of weights.

    What cannot be integrated, because B does not come from a linear as it is, is multiplied when the model runs.
    """
    owners = {linear.node: linear for linear in linears}
    for scan in scans:
        insert = Insertion(gm, scan.node)
        u, delta, A, B, C, *rest = scan.node.args
        channels, states = (int(size) for size in A.meta["val"].shape)  # type: ignore[union-attr]
        inverse = insert.tensor(f"{scan.name}.{INVERSE_CHANNELS}", torch.ones(channels))
        scan.node.meta[FIRST_ROWS] = {}
        mixing = [
            _multiplied(insert, value, scan, leaf, states, owners if integrate else {})
            for value, leaf in ((B, B_FACTOR), (C, C_FACTOR))
        ]
        scan.node.args = (insert.call(aten.mul.Tensor, u, inverse), delta, A, *mixing, *rest)
        after = Insertion(gm, scan.node.next)
        factor = after.tensor(f"{scan.name}.{CHANNELS}", torch.ones(channels))
        product = after.call(aten.mul.Tensor, scan.node, factor)
        for user in [user for user in scan.node.users if user is not product]:
            user.replace_input_with(scan.node, product)
    return gm


def _multiplied(
    insert: Insertion, value: Any, scan: ScanSite, leaf: str, states: int, owners: Mapping[Node, LinearSite]
) -> Any:
    """B or C (B, L, S) times a buffer: (S,), or (N, 1) of all rows of the weight that makes it."""
    found, name = token_map(value), f"{scan.name}.{leaf}"
    linear = owners.get(found.source) if found is not None else None
    if found is None or linear is None or len(linear.node.args) > 2:
        return insert.call(aten.mul.Tensor, value, insert.tensor(name, torch.ones(states)))
    before = Insertion(insert.gm, linear.node)
    x, weight = linear.node.args
    factor = before.tensor(name, torch.ones(linear.out_features, 1))
    linear.node.args = (x, before.call(aten.mul.Tensor, weight, factor))
    scan.node.meta[FIRST_ROWS][leaf] = found.first
    return value


def factors_of(gm: GraphModule, name: str) -> dict[str, Tensor]:
    """The buffers of the scan of that name; none where its state is not reparameterized."""
    names = [f"{name}.{leaf}" for leaf in (CHANNELS, INVERSE_CHANNELS, B_FACTOR, C_FACTOR)]
    return {name: attribute(gm, name) for name in names if has_attribute(gm, name)}


def set_factors(gm: GraphModule, scan: QuantizedScan, channels: Tensor, states: Tensor) -> None:
    """Gives a scan r_C and r_D, in place."""
    name, rows = scan.name, scan.fake.first_rows
    attribute(gm, f"{name}.{CHANNELS}").copy_(channels)
    attribute(gm, f"{name}.{INVERSE_CHANNELS}").copy_(1 / channels)
    for leaf, value in ((B_FACTOR, 1 / states), (C_FACTOR, states)):
        factor = attribute(gm, f"{name}.{leaf}")
        if leaf in rows:
            factor[rows[leaf] : rows[leaf] + len(states), 0] = value
        else:
            factor.copy_(value)


def fold_factors(gm: GraphModule) -> GraphModule:
    """Rows of a weight that no quantizer folds, times their factor: a constant."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        if all(isinstance(arg, Node) and arg.op == "get_attr" for arg in node.args):
            weight, factor = (str(arg.target) for arg in node.args)
            if factor.endswith((B_FACTOR, C_FACTOR)):
                value = attribute(gm, weight).detach() * attribute(gm, factor)
                with gm.graph.inserting_before(node):
                    folded = gm.graph.get_attr(set_tensor(gm, f"{factor}_weight", value))
                folded.meta.update(node.meta)
                node.replace_all_uses_with(folded)
    return gm


def determine_factors(mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r_C (E,), r_L (L,), r_D (S,) from the mean over images of |h| (L, S, E) (k-scaled paper, factor-determining).

    R_* is the mean over the two other axes; r_* = R_*^p_*, where p_* is R_*'s standard deviation's share of the three.
    """
    means = mean.mean((0, 1)), mean.mean((1, 2)), mean.mean((0, 2))
    spread = torch.stack([value.std(correction=0) for value in means])
    shares = spread / spread.sum().clamp(min=SMALLEST)
    channels, tokens, states = (value.pow(share) + SMALLEST for value, share in zip(means, shares, strict=True))
    return channels, tokens, states
