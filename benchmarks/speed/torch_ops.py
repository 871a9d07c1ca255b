"""The scan and the convolution in PyTorch's own operators, for backends that do not know ours.

Shapes as in `reference`: u, delta, z (B, L, E); A (E, S); B, C (B, L, S); x (B, L, E), weight (E, K).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from ptq4vm import ops
from ptq4vm.graph.capture import check_input
from ptq4vm.graph.pipeline import clean_up


def loop_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The loop over tokens that Mamba's code falls back to without its CUDA extension (`selective_scan_ref`)."""
    dt = _dt(delta, delta_bias, delta_softplus)
    decay = torch.exp(torch.einsum("ble,es->bles", dt, A))
    added = torch.einsum("ble,bls,ble->bles", dt, B, u)
    h = u.new_zeros(len(u), *A.shape)
    outputs = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + added[:, t]
        outputs.append(torch.einsum("bes,bs->be", h, C[:, t]))
    return _gated(torch.stack(outputs, 1), u, D, z)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`causal_conv1d` as nn.Conv1d computes it, padded on both sides and cut."""
    taps, tokens = weight.shape[1], x.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=taps - 1, groups=len(weight))
    y = y[..., :tokens].transpose(1, 2)
    return F.silu(y) if silu else y


LOOP: dict[Any, Callable[..., Tensor]] = {
    ops.selective_scan.default: loop_scan,
    ops.causal_conv1d.default: conv1d,
}


def replace_ops(gm: GraphModule, replacements: Mapping[Any, Callable[..., Tensor]]) -> GraphModule:
    """Copies a captured graph, with other functions in place of our operators and without checks of inputs."""
    gm = copy.deepcopy(gm).eval()
    for node in list(gm.graph.nodes):
        node.target = replacements.get(node.target, node.target)
        if node.target is check_input:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    return clean_up(gm)


def _dt(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = delta if bias is None else delta + bias
    return F.softplus(dt) if softplus else dt


def _gated(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    y = y if D is None else y + u * D
    return y if z is None else y * F.silu(z)
