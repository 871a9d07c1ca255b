"""Rotation of what the residual stream's writers read: out_proj, fc2, an attention's proj.

Their inputs come out of a gate or an activation, and a few of their values are far larger than the rest, other ones for
every image. A rotation spreads each over all channels; W is rotated with x, so the product stays (QuaRot, Ashkboos et
al. 2024, section 4: "online Hadamard"). Smoothing comes before it: a channel that is large in every image would be
spread over all of them too. Shapes: x (B, L, D), W (N, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion, aten
from ptq4vm.graph.sites import LinearSite
from ptq4vm.graph.views import is_view

_FACTORS = {aten.dropout.default, aten.mul.Tensor}


def insert_rotation(gm: GraphModule, sites: Sequence[LinearSite]) -> GraphModule:
    """`linear(x, W)` → `linear(x R, W R)` where the linear writes to the residual stream; R is orthogonal and its own
    inverse."""
    for site in sites:
        if writes_stream(site.node):
            insert, (x, weight, *bias) = Insertion(gm, site.node), site.node.args
            site.node.args = (*(insert.call(ops.rotate.default, value) for value in (x, weight)), *bias)
    return gm


def writes_stream(node: Node) -> bool:
    """Whether a value is added to another that depends on the input, as it is or times a factor."""
    for user in node.users:
        if (is_view(user) or user.target in _FACTORS) and writes_stream(user):
            return True
        if user.target is aten.add.Tensor and all(map(_has_batch, user.args)):
            return True
    return False


def _has_batch(value: Any) -> bool:
    """Whether a value differs from image to image: an axis of it is not fixed."""
    shape = value.meta["val"].shape if isinstance(value, Node) else ()
    return not all(isinstance(size, int) for size in shape)
