"""Bias correction: a constant added to each linear's output, free at run time, against the mean error of rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import GraphModule

from ptq4vm.fake_quantize import constant
from ptq4vm.graph import Insertion, LinearSite, aten
from ptq4vm.quantizer import correction_of


def insert_correction(gm: GraphModule, sites: Sequence[LinearSite]) -> GraphModule:
    """`linear(x, W, b)` → `linear(x, W, b + c)` with c = 0, a parameter that does not learn yet."""
    for site in sites:
        insert, (x, weight, *bias) = Insertion(gm, site.node), site.node.args
        zeros = nn.Parameter(torch.zeros(site.out_features), requires_grad=False)
        correction = insert.tensor(f"{site.name}.correction", zeros)
        known = [b for b in bias if b is not None]
        site.node.args = (x, weight, insert.call(aten.add.Tensor, *known, correction) if known else correction)
    return gm


def fold_correction(gm: GraphModule) -> GraphModule:
    """b + c → one constant, `corrected_bias`."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        correction = correction_of(gm, node)
        if correction is None:
            continue
        with torch.no_grad():
            value = constant(gm, node.args[2]).clone()
        name = correction.removesuffix(".correction")
        node.args = (*node.args[:2], Insertion(gm, node).tensor(f"{name}.corrected_bias", value))
    return gm
