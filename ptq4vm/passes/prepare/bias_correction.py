"""Bias correction: b - E[x_q (W_q - W)], so that a quantized weight's error is zero on average (k-scaled paper).

Where a linear or a convolution has no bias of its own, the constant that is added to its result alone is its bias: that
of dt_proj belongs to the scan's step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion, aten, attribute, has_attribute
from ptq4vm.graph.sites import ConvolutionSite, LinearSite, sites_of

CORRECTION = "bias_correction"
"""The buffer beside a linear or a convolution that is added to its bias."""


def insert_corrections(gm: GraphModule) -> GraphModule:
    """bias → bias + a buffer of zeros, for every linear and convolution to be quantized that has one."""
    for node, site in (sites_of(gm, LinearSite) | sites_of(gm, ConvolutionSite)).items():
        found = _bias(node)
        if found is None:
            continue
        user, place = found
        bias: Any = user.args[place]
        insert = Insertion(gm, user)
        zeros = insert.tensor(f"{site.name}.{CORRECTION}", torch.zeros(bias.meta["val"].shape))
        corrected = insert.call(aten.add.Tensor, bias, zeros)
        user.args = (*user.args[:place], corrected, *user.args[place + 1 :])
    return gm


def _bias(node: Node) -> tuple[Node, int] | None:
    """Returns the node and the position of the argument that is a linear's or convolution's bias; None without one."""
    if len(node.args) > 2 and isinstance(node.args[2], Node):
        return node, 2
    user = next(iter(node.users)) if len(node.users) == 1 else None
    features = node.meta["val"].shape[-1]
    if user is not None and user.target is aten.add.Tensor and user.args[0] is node:
        other: Any = user.args[1]
        if isinstance(other, Node) and tuple(other.meta["val"].shape) == (features,):
            return user, 1
    if user is not None and user.target is ops.selective_scan.default and user.args[1] is node and user.args[7]:
        return user, 7
    return None


def correction_of(gm: GraphModule, name: str) -> Tensor | None:
    """The buffer that is added to a bias; None where there is no bias."""
    path = f"{name}.{CORRECTION}"
    return attribute(gm, path) if has_attribute(gm, path) else None
