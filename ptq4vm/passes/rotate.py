"""Rotation of what the residual stream's writers read: out_proj, fc2, an attention's proj.

Their inputs come out of a gate or an activation, and a few of their values are far larger than the rest, other ones for
every image. A rotation spreads each over all channels; W is rotated with x, so the product stays (QuaRot, Ashkboos et
al. 2024, "online Hadamard transform"). Shapes: x (B, L, D), W (N, D).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm.graph import Insertion, LinearSite, aten, is_view, parameter_of

_FACTORS = {aten.dropout.default, aten.mul.Tensor}

LARGEST = 16
"""Channels that one factor of the rotation mixes; so a channel costs at most the sum of the factors, not D."""


def factors(channels: int) -> list[int]:
    """Of the number of channels; a prime above `LARGEST` is left out, and channels that it counts are not mixed."""
    found: list[int] = []
    for prime in (2, 3, 5, 7, 11, 13):
        while channels % prime == 0:
            channels //= prime
            if found and found[-1] % prime == 0 and found[-1] * prime <= LARGEST:
                found[-1] *= prime
            else:
                found.append(prime)
    return found


@functools.cache
def orthogonal(size: int) -> Tensor:
    """Hadamard's matrix (size, size) for a power of two, else the cosine transform's, both orthonormal."""
    if size & (size - 1) == 0:
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return matrix / math.sqrt(size)
    steps = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (steps + 0.5) * steps.unsqueeze(1)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def insert_rotation(gm: GraphModule, sites: Sequence[LinearSite]) -> GraphModule:
    """`linear(x, W)` → `linear(x R, W R)` where the linear writes to the residual stream; R is orthogonal."""
    for site in sites:
        if _writes_stream(site.node):
            insert, (x, weight, *bias) = Insertion(gm, site.node), site.node.args
            site.node.args = (*(_rotated(insert, value, site.in_features) for value in (x, weight)), *bias)
    return gm


def _rotated(insert: Insertion, value: Any, channels: int) -> Any:
    for size in factors(channels):
        matrix = insert.tensor(f"rotation_{size}", orthogonal(size))
        groups = insert.call(aten.unflatten.int, value, -1, [channels // size, size])
        mixed = insert.call(aten.matmul.default, groups, matrix)
        # the next factor mixes channels that this one kept apart
        value = insert.call(aten.flatten.using_ints, insert.call(aten.transpose.int, mixed, -1, -2), -2)
    return value


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
