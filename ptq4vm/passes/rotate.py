"""Rotation of what the residual stream's writers read: out_proj, fc2, an attention's proj.

Their inputs come out of a gate or an activation, and a few of their values are far larger than the rest, other ones for
every image. A rotation spreads each over all channels; W is rotated with x, so the product stays (QuaRot, Ashkboos et
al. 2024, section 4: "online Hadamard").

A channel that is large only because W's column for it is small would be spread over all of them too, and the column
with it. Both errors grow with Σ|x_d|² · Σ|W_d|², which is least where |x_d| is to |W_d| the same for all channels d.
Where x comes from a norm, also by way of a gate, its weight and W are therefore rescaled first, as if the norm's weight
and bias told |x_d|. The factors are powers of two: nothing is even rounded. Shapes: x (B, L, D), W (N, D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph import Insertion, LinearSite, aten, attribute, is_view, parameter_of
from ptq4vm.passes.patterns import arguments, is_call, only_user, same_tokens

_FACTORS = {aten.dropout.default, aten.mul.Tensor}


def insert_rotation(gm: GraphModule, sites: Sequence[LinearSite]) -> GraphModule:
    """`linear(x, W)` → `linear(x R, W R)` where the linear writes to the residual stream; R is orthogonal."""
    for site in sites:
        if _writes_stream(site.node):
            _balance(gm, site.node)
            insert, (x, weight, *bias) = Insertion(gm, site.node), site.node.args
            site.node.args = (*(insert.call(ops.rotate.default, value) for value in (x, weight)), *bias)
    return gm


@torch.no_grad()
def _balance(gm: GraphModule, linear: Node) -> None:
    """Makes the norm before it and W's columns of one size, in place, where both serve this linear alone."""
    x, weight, *_ = arguments(linear)
    norm = _norm_before(x)
    if norm is None:
        return
    affine = [node for node in arguments(norm)[2 : 4 if norm.target is aten.layer_norm.default else 3] if node]
    if not affine or not all(_is_read_once(gm, node) for node in (weight, *affine)):
        return
    matrix, *vectors = (attribute(gm, str(node.target)) for node in (weight, *affine))
    if all(vector.shape == matrix.shape[1:] for vector in vectors):
        factor = _power_of_two((_sizes(matrix) / _sizes(torch.stack(vectors))).sqrt())
        matrix.div_(factor)
        for vector in vectors:
            vector.mul_(factor)


def _norm_before(x: Node) -> Node | None:
    """The norm whose result, times others, is x; it has no other reader."""
    x = same_tokens(x)
    if only_user(x) is None:
        return None
    if is_call(x, aten.mul.Tensor) and x.args[0] is not x.args[1]:
        return next(filter(None, (_norm_before(factor) for factor in x.all_input_nodes)), None)
    return x if is_call(x, aten.rms_norm.default, aten.layer_norm.default) else None


def _is_read_once(gm: GraphModule, parameter: Node) -> bool:
    """Whether this is all of a parameter, which nothing else reads, not by another node either."""
    if parameter.op != "get_attr":
        return False
    return sum(len(node.users) for node in gm.graph.find_nodes(op="get_attr", target=parameter.target)) == 1


def _sizes(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=0)


def _power_of_two(sizes: Tensor) -> Tensor:
    """The nearest, by ratio; 1 for what is not a size: 0, infinity, and 0 / 0."""
    return torch.where(sizes.isfinite() & (sizes > 0), sizes, 1.0).log2().round().exp2()


def _writes_stream(node: Node) -> bool:
    """Whether a value is added to another that depends on the input, as it is or times a factor."""
    for user in node.users:
        if (is_view(user) or user.target in _FACTORS) and _writes_stream(user):
            return True
        if user.target is aten.add.Tensor and all(
            isinstance(arg, Node) and parameter_of(arg) is None for arg in user.args
        ):
            return True
    return False
