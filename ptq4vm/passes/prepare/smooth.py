"""Smoothing: x / s and W · s around each linear (SmoothQuant eq. 3 and 4; PTQ4VM section 4.2).

Shapes: x (images, L, D), W (N, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4vm.graph.insert import Insertion, aten, set_tensor
from ptq4vm.graph.sites import LinearSite, sites_of, update_site
from ptq4vm.quantizers import ActivationFakeQuantize, WeightFakeQuantize

SMALLEST_ACTIVATION, SMALLEST_WEIGHT, SMALLEST_SCALE = 1e-3, 1e-5, 1e-5
"""Floors of max|X|, max|W| and s, as in the paper's code."""


def insert_smoothing(gm: GraphModule) -> GraphModule:
    """`linear(x, W)` → `linear(x · (1 / s), W · s)` with s = exp(log s) = 1; log s does not learn yet.

    A linear whose input has the scale of another site's output is left: s would change that output.
    """
    for node, site in sites_of(gm, LinearSite).items():
        if site.shares_qparams_with is not None:
            continue
        insert, (x, weight, *bias) = Insertion(gm, node), node.args
        zeros = nn.Parameter(torch.zeros(site.in_features), requires_grad=False)
        update_site(node, log_smooth=f"{site.name}.log_smooth")
        scale = insert.call(aten.exp.default, insert.tensor(f"{site.name}.log_smooth", zeros))
        smoothed = insert.call(aten.mul.Tensor, x, insert.call(aten.reciprocal.default, scale))
        node.args = (smoothed, insert.call(aten.mul.Tensor, weight, scale), *bias)
    return gm


def smoothing_scale(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """s_d = max|X_d|^α / max_n|W_nd|^(1-α) from these maxima, both (D,) (SmoothQuant eq. 4)."""
    x_max, w_max = x_max.clamp(min=SMALLEST_ACTIVATION), w_max.clamp(min=SMALLEST_WEIGHT)
    return (x_max.pow(alpha) / w_max.pow(1 - alpha)).clamp(min=SMALLEST_SCALE)


def merge_smoothing(gm: GraphModule) -> GraphModule:
    """A fake-quantizer of x · f → one that multiplies by f itself: x is read once, and so is its gradient."""
    for node in gm.graph.find_nodes(op="call_module"):
        fake = gm.get_submodule(str(node.target))
        if isinstance(fake, (ActivationFakeQuantize, WeightFakeQuantize)) and _is_smoothed(node.args[0]):
            node.args = node.all_input_nodes[0].args
    return gm


def _is_smoothed(node: Any) -> bool:
    """Returns whether a node is x · (1 / exp(log s)) or W · exp(log s), of our own log s."""
    if not isinstance(node, Node) or node.target is not aten.mul.Tensor:
        return False
    factor = node.args[1]
    if isinstance(factor, Node) and factor.target is aten.reciprocal.default:
        factor = factor.args[0]
    return isinstance(factor, Node) and factor.target is aten.exp.default and _is_log_smooth(factor.args[0])


def _is_log_smooth(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr" and str(node.target).endswith(".log_smooth")


def fold_smoothing(gm: GraphModule) -> GraphModule:
    """1 / exp(log s) → a constant `inv_smooth`, computed once."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.reciprocal.default):
        scale = node.args[0]
        if scale.target is not aten.exp.default or not _is_log_smooth(scale.args[0]):
            continue
        name = str(scale.args[0].target)
        with torch.no_grad():
            value = gm.get_parameter(name).exp().reciprocal()
        with gm.graph.inserting_before(node):
            folded = gm.graph.get_attr(set_tensor(gm, f"{name.removesuffix('.log_smooth')}.inv_smooth", value))
        folded.meta["val"] = value
        node.replace_all_uses_with(folded)
    return gm
