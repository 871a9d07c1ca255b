"""Smoothing: x / s and W · s around each linear (SmoothQuant eq. 3 and 4; PTQ4VM section 4.2).

Shapes: x (images, L, D), W (N, D).
"""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4vm.graph.insert import Insertion, aten, attribute, replace_node
from ptq4vm.graph.sites import LinearSite, sites_of, update_site

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
    for node, site in sites_of(gm, LinearSite).items():
        if site.log_smooth is not None and not site.rotated:
            for quantizer in node.all_input_nodes[:2]:
                quantizer.args = quantizer.all_input_nodes[0].args
    return gm


def fold_smoothing(gm: GraphModule) -> GraphModule:
    """1 / exp(log s) → a constant `inv_smooth`, computed once."""
    names = {site.log_smooth: f"{site.name}.inv_smooth" for site in sites_of(gm, LinearSite).values()}
    for node in gm.graph.find_nodes(op="call_function", target=aten.reciprocal.default):
        (scale,) = node.all_input_nodes
        log_scale = scale.args[0] if scale.target is aten.exp.default else None
        if isinstance(log_scale, Node) and log_scale.target in names:
            with torch.no_grad():
                value = attribute(gm, str(log_scale.target)).exp().reciprocal()
            replace_node(node, Insertion(gm, node).tensor(names[log_scale.target], value))
    return gm
