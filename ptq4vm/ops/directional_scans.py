"""Selective scans along K orders of the tokens, from the projections of their inputs on, in one pass.

Shapes as in `scans` and `quantization`, with K directions. Directions do not move tokens: every tensor keeps the tokens
in their natural (row-major) order, and `order` (K, T) says which token each direction reads at its t-th step. -1 reads
a token of zeros, which is how windows pad a map that they do not divide. Per-token qparams (K, L) or (K, 1) are in
natural order too. Floating-point inputs are float32 or bfloat16 and are computed in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.ops._arguments import FLOATS, Values, check_order, check_shape
from ptq4vm.ops._define import define
from ptq4vm.ops.layouts import tiles_shape
from ptq4vm.ops.linears import check_sums, linear_packed
from ptq4vm.ops.quantization import QPARAMS, quantize
from ptq4vm.ops.scans import selective_scan

MAX_RANK = 512

_INPUTS = (
    "Tensor u, Tensor projected, Tensor step_inv_scale, Tensor step_scale, Tensor step_zero_point, "
    "Tensor? step_inv_smooth, int step_bits, Tensor step_weight, Tensor step_weight_sum, Tensor step_weight_scale, "
    "Tensor step_bias, Tensor A, Tensor? D, Tensor? z, Tensor order"
)
_SHAPES = (
    "order order K T; u float K|1 B L E; projected float K B L P; A float K E S; step_inv_scale float K L|1; "
    "step_scale float =step_inv_scale; step_zero_point zeros =step_inv_scale; step_bits bits; step_weight weight *; "
    "step_weight_sum sums K E; step_weight_scale float K E; step_bias float K E; D float K E; z float B L E"
)


def _check_directions(values: Values) -> None:
    projected, weight, smooth = values["projected"], values["step_weight"], values["step_inv_smooth"]
    (directions, channels, states), tokens = values["A"].shape, projected.shape[2]
    rank = projected.shape[-1] - 2 * states
    if not directions:
        raise ValueError("the order (K, T) has no direction")
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"projected has {projected.shape[-1]} channels: with {states} states that leaves {rank} for the step, "
            f"which must be between 1 and {MAX_RANK}"
        )
    check_shape("step_weight", weight, (directions, *tiles_shape(channels, rank, weight.dtype == torch.uint8)))
    if smooth is not None:
        check_shape("step_inv_smooth", smooth, (directions, rank))
        if smooth.dtype not in FLOATS:
            raise ValueError(f"step_inv_smooth must be a float, it is {smooth.dtype}")
    check_sums("step_weight_sum", values["step_weight_sum"], rank)
    check_order(values["order"], tokens, least=-1)


def _fake(u: Tensor, projected: Tensor, *rest: Any) -> Tensor:
    merge = rest[-2]
    return u.new_empty(u.shape[1:] if merge else (projected.shape[0], *u.shape[1:]))


def directional_scan(u: Tensor, projected: Tensor, *rest: Any) -> Tensor:
    """Computes selective scans along K orders, gated by SiLU of z, times `factor`.

    u (K, B, L, E), or (1, B, L, E) for all directions; projected (K, B, L, R + 2S) float32 is [low-rank dt | B | C].
    dt is quantized with qparams (K, L), smoothing (K, R), and goes through the integer linear of packed weights
    (K, E, R) with scales (K, E); those arguments are called step. step_bias, D (K, E); A (K, E, S); z (B, L, E).
    `merge` returns the sum of all directions (B, L, E), else each is returned, (K, B, L, E), in u's dtype.
    """
    *step, A, D, z, order, merge, factor = rest
    inv_scale, scale, zero_point, inv_smooth, bits, weight, weight_sum, weight_scale, bias = step
    states, outputs = A.shape[-1], []
    low_rank, B, C = projected.float().split((projected.shape[-1] - 2 * states, states, states), -1)
    gate = factor if z is None else F.silu(z.float()) * factor
    for k, tokens in enumerate(order.long().unbind(0)):
        smooth = None if inv_smooth is None else inv_smooth[k]
        codes = quantize(low_rank[k], inv_scale[k], zero_point[k], smooth, bits)
        packed = (weight[k], weight_sum[k], weight_scale[k], None)
        delta = linear_packed(codes, scale[k], zero_point[k], *packed, torch.float32)
        skip = None if D is None else D[k]
        x = u[k if len(u) > 1 else 0].float()
        x_k, delta_k, B_k, C_k = (_read(value, tokens) for value in (x, delta, B[k], C[k]))
        y = selective_scan(x_k, delta_k, A[k], B_k, C_k, skip, None, bias[k], True)
        places = torch.where(tokens < 0, x.shape[1], tokens)  # a mask would make a GPU wait for the host
        natural = F.pad(torch.zeros_like(x), (0, 0, 0, 1)).index_copy_(1, places, y)[:, :-1]
        outputs.append(natural if merge else natural * gate)
    y = sum(outputs[1:], outputs[0]) * gate if merge else torch.stack(outputs)
    return y.to(u.dtype).contiguous()


def _read(x: Tensor, tokens: Tensor) -> Tensor:
    """Returns x (B, L, C) at the tokens (T,), zeros where there is none."""
    return torch.where((tokens >= 0)[:, None], x[:, tokens.clamp(min=0)], 0.0)


def directional_scan_quantize(u: Tensor, *inputs: Any) -> Tensor:
    """Returns the codes (B, L, E) of the merged `directional_scan`; inv_scale, zero_point (L,) or (1,)."""
    *scan, factor, inv_scale, zero_point, inv_smooth, bits = inputs
    return quantize(directional_scan(u.float(), *scan, True, factor), inv_scale, zero_point, inv_smooth, bits)


define(
    f"directional_scan({_INPUTS}, bool merge, float factor) -> Tensor",
    directional_scan,
    _SHAPES,
    _fake,
    checks=(_check_directions,),
)
define(
    f"directional_scan_quantize({_INPUTS}, float factor, {QPARAMS}) -> Tensor",
    directional_scan_quantize,
    f"{_SHAPES}; inv_scale float L|1; zero_point zeros =inv_scale; inv_smooth float E; bits bits",
    lambda u, *rest: u.new_empty(u.shape[1:], dtype=torch.int8),
    checks=(_check_directions,),
)
