"""Fused operators as the operators that they replace, called one by one: what `kernels.py` compares them with."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm import ops
from ptq4vm.ops import layouts


def norm_one_by_one(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    rotated: bool,
    *codes: Any,
) -> object:
    total = x.float() if residual is None else x + residual
    shape = total.shape[-1:]
    y = F.rms_norm(total, shape, weight, eps) if rms else F.layer_norm(total, shape, weight, bias, eps)
    return total, codes_one_by_one(y, rotated, *codes)


def rotate_one_by_one(x: Tensor, gelu: bool, *codes: Any) -> object:
    return codes_one_by_one(F.gelu(x) if gelu else x, True, *codes)


def gate_one_by_one(x: Tensor, gate: Tensor, silu: bool, *codes: Any) -> object:
    products = [value * (F.silu(factor) if silu else factor) for value, factor in zip(x, gate, strict=True)]
    return codes_one_by_one(functools.reduce(torch.add, products), False, *codes)


def codes_one_by_one(
    y: Tensor, rotated: bool, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int
) -> Tensor:
    if rotated:
        y, inv_smooth = ops.rotate(y if inv_smooth is None else y * inv_smooth), None
    return ops.quantize(y, inv_scale, zero_point, inv_smooth, bits)


def conv1d_one_by_one(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, *codes: Any) -> object:
    """Codes of the two directions that need no gather; the second one stays reversed."""
    inv_scale, zero_point, smooth, bits = codes
    u = [ops.causal_conv1d(y, weight[k], bias[k], True) for k, y in enumerate((x, x.flip(1)))]
    return u, [ops.quantize(u[k], inv_scale[k], zero_point[k], smooth[k], bits) for k in range(2)]


def conv2d_one_by_one(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, *codes: Any) -> object:
    inv_scale, zero_point, _, bits = codes
    maps = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    filters = weight.unsqueeze(1).to(x.dtype)
    u = F.silu(F.conv2d(maps, filters, bias.to(x.dtype), padding=1, groups=len(weight)))
    u = u.permute(0, 2, 3, 1).flatten(1, 2)
    return u, [ops.quantize(u, inv_scale[k], zero_point[k], None, bits) for k in range(len(inv_scale))]


def gelu_one_by_one(*arguments: Any) -> Tensor:
    """linear_gelu_quantize without fusion."""
    *linear, rotated, inv_scale, zero_point, inv_smooth, bits = arguments
    y = F.gelu(ops.linear_packed(*linear, torch.bfloat16))
    return codes_one_by_one(y, rotated, inv_scale, zero_point, inv_smooth, bits)


def scan_one_by_one(*arguments: Any) -> Any:
    """Two directions of Vim, flipped copies and all, with our scan: what a graph of single operators does."""
    *steps, factor, inv_scale, zero_point, inv_smooth, bits = arguments
    return ops.quantize(unmerged(*steps, factor), inv_scale, zero_point, inv_smooth, bits)


def unmerged(*steps: Any) -> Tensor:
    """`directional_scan` as selective scans of tokens that are gathered and scattered, and their sum."""
    u, projected, _, _, _, _, _, packed, _, scale, bias, A, D, z, order, factor = steps
    rank, states = projected.shape[-1] - 2 * A.shape[-1], A.shape[-1]
    low_rank, B, C = projected.split((rank, states, states), -1)
    total = None
    for k in range(len(order)):
        tokens = order[k].long()
        weight = layouts.unpack_weight(packed[k], A.shape[1], rank) * scale[k][:, None]
        delta = F.linear(low_rank[k], weight.to(low_rank.dtype))[:, tokens]
        inputs = (u[k if len(u) > 1 else 0][:, tokens], delta, A[k], B[k][:, tokens], C[k][:, tokens], D[k])
        y = ops.selective_scan(*inputs, None if z is None else z[:, tokens], bias[k], True)
        y = torch.empty_like(y).index_copy_(1, tokens, y)
        total = y if total is None else total + y
    return total * factor
