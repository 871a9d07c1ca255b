"""Rotation of what the residual stream's writers read: out_proj, fc2, an attention's proj.

Their inputs come out of a gate or an activation, and a few of their values are far larger than the rest, other ones for
every image. A rotation spreads each over all channels; W is rotated with x, so the product stays (QuaRot, Ashkboos et
al. 2024, section 4: "online Hadamard"). Smoothing comes before it: a channel that is large in every image would be
spread over all of them too. Shapes: x (B, L, D), W (N, D).
"""

from torch.fx import GraphModule

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion
from ptq4vm.graph.sites import LinearSite, sites_of, update_site
from ptq4vm.graph.views import writes_stream


def insert_rotation(gm: GraphModule) -> GraphModule:
    """`linear(x, W)` → `linear(x R, W R)` where the linear writes to the residual stream; R is orthogonal and its own
    inverse."""
    for node in sites_of(gm, LinearSite):
        if writes_stream(node):
            insert, (x, weight, *bias) = Insertion(gm, node), node.args
            node.args = (*(insert.call(ops.rotate.default, value) for value in (x, weight)), *bias)
            update_site(node, rotated=True)
    return gm
