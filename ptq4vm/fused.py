"""What the fused operators mean: plain compositions of `reference`, which a kernel computes in one pass.

Shapes as in `reference`, and K directions of a scan. Directions do not move tokens: every tensor keeps the tokens in
their natural (row-major) order, and `order` (K, T) says which token each direction reads at its t-th step. -1 reads a
token of zeros, which is how windows pad a map that they do not divide. Per-token qparams (K, L) or (K, 1) are in
natural order too. Floating-point inputs are float32 or bfloat16 and are computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm import reference

GROUP, STEP = 16, 64
"""Output channels and input channels in a tile of a packed weight."""


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """The layout that the kernels read: int8 codes (…, N, D) → (…, ceil(N / 16), ceil(D / 64), 16, 64), zero padded.

    A row of 64 bytes holds four input channels of each of 16 output channels. Up to 4 bits its two halves share bytes,
    (…, 16, 32) uint8: the first 32 codes of a row are the low nibbles, the last 32 the high ones.
    """
    features, channels = codes.shape[-2:]
    padded = F.pad(codes, (0, -channels % STEP, 0, -features % GROUP))
    tiles = padded.unflatten(-1, (-1, 16, 4)).unflatten(-4, (-1, GROUP)).movedim(-4, -2).flatten(-2)
    if bits > 4:
        return tiles.contiguous()
    return ((tiles[..., 32:] << 4) | (tiles[..., :32] & 15)).to(torch.uint8)


def unpack_weight(packed: Tensor, features: int, channels: int) -> Tensor:
    """int8 codes (…, features, channels): the inverse of `pack_weight`."""
    tiles = packed
    if packed.dtype == torch.uint8:
        nibbles = torch.cat((packed & 15, packed >> 4), -1).to(torch.int8)
        tiles = torch.where(nibbles > 7, nibbles - 16, nibbles)
    codes = tiles.unflatten(-1, (GROUP, 4)).movedim(-2, -4).flatten(-3).flatten(-3, -2)
    return codes[..., :features, :channels]


def pad_weight(codes: Tensor, bits: int) -> Tensor:
    """The layout of GPUs' linears: int8 codes (…, N, D) → rows (…, N, D padded with zeros to a multiple of 16).

    Up to 4 bits two codes share a byte, as in `reference.pack_int4`, and D is padded to a multiple of 32: that is for
    tensor cores that multiply nibbles, and says that the linear's input has codes of at most 4 bits too.
    """
    padded = F.pad(codes, (0, -codes.shape[-1] % (16 if bits > 4 else 32))).contiguous()
    return padded if bits > 4 else reference.pack_int4(padded)


def _weight_codes(weight: Tensor, weight_scale: Tensor, channels: int) -> Tensor:
    """int8 codes (…, N, channels) of either layout, which its number of axes tells."""
    if weight.dim() > weight_scale.dim() + 1:
        return unpack_weight(weight, weight_scale.shape[-1], channels)
    codes = reference.unpack_int4(weight, 2 * weight.shape[-1]) if weight.dtype == torch.uint8 else weight
    return codes[..., :channels]


def linear_packed(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.linear` with a weight of `pack_weight` or `pad_weight`, and the int32 sums of its rows' codes.

    Sums are shaped as weight_scale. weight_scale (N,) is one linear of x (…, D). weight_scale (K, N) is K of them, with
    x (K, …, D), x_scale and x_zero_point (K, L) or (K, 1), and bias (K, N).
    """
    w_q = _weight_codes(weight, weight_scale, x.shape[-1])
    if weight_scale.dim() == 1:
        return reference.linear(x, x_scale, x_zero_point, w_q, weight_scale, bias, dtype)
    biases = [None] * len(x) if bias is None else bias.unbind(0)
    return torch.stack(
        [
            reference.linear(x[k], x_scale[k], x_zero_point[k], w_q[k], weight_scale[k], biases[k], dtype)
            for k in range(len(x))
        ]
    )


def linear_gelu_quantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    rotated: bool,
    inv_scale: Tensor,
    zero_point: Tensor,
    inv_smooth: Tensor | None,
    bits: int,
) -> Tensor:
    """Codes of GELU (the exact one, with erf) of one linear, or of its rotation: what an MLP's second linear reads."""
    y = F.gelu(linear_packed(x, x_scale, x_zero_point, weight, weight_sum, weight_scale, bias, torch.float32))
    return _codes(y, rotated, inv_scale, zero_point, inv_smooth, bits)


def rotate_quantize(
    x: Tensor, gelu: bool, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int
) -> Tensor:
    """Codes of the rotated x (…, D), of its GELU (the exact one) where `gelu`: what a writer of the stream reads."""
    value = F.gelu(x.float()) if gelu else x.float()
    return _codes(value, True, inv_scale, zero_point, inv_smooth, bits)


def _codes(
    x: Tensor, rotated: bool, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int
) -> Tensor:
    """Of x, or of its rotation. Smoothing comes first: a rotation spreads a large channel over all of them."""
    if rotated:
        x, inv_smooth = reference.rotate(x if inv_smooth is None else x * inv_smooth.float()), None
    return reference.quantize(x, inv_scale, zero_point, inv_smooth, bits)


def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    rotated: bool,
    inv_scale: Tensor,
    zero_point: Tensor,
    inv_smooth: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """x + residual in float32 (empty without one), and the codes of its RMS norm or layer norm, or of its rotation."""
    total = x.float() if residual is None else x.float() + residual.float()
    shape = total.shape[-1:]
    weight, bias = (None if value is None else value.float() for value in (weight, bias))
    normed = F.rms_norm(total, shape, weight, eps) if rms else F.layer_norm(total, shape, weight, bias, eps)
    codes = _codes(normed, rotated, inv_scale, zero_point, inv_smooth, bits)
    return total.new_empty(0) if residual is None else total, codes


def conv1d_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    inv_scale: Tensor,
    zero_point: Tensor,
    inv_smooth: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """K causal convolutions and SiLU along K orders of the tokens of x (B, L, E), and their codes: both (K, B, L, E).

    weight (K, E, taps), bias (K, E), order (K, L) permutations, inv_smooth (K, E). The first result has x's dtype; the
    codes are those of the float32 values.
    """
    outputs = []
    for k, tokens in enumerate(order.long().unbind(0)):
        y = reference.causal_conv1d(x[:, tokens].float(), weight[k], None if bias is None else bias[k], True)
        outputs.append(torch.empty_like(y).index_copy_(1, tokens, y))
    return _with_codes(torch.stack(outputs), inv_scale, zero_point, inv_smooth, bits, x.dtype)


def conv2d_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    inv_scale: Tensor,
    zero_point: Tensor,
    inv_smooth: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Depth-wise convolution and SiLU of maps x (B, H·W, E), and its codes for K directions (K, B, H·W, E).

    weight (E, rows, columns), both odd: zero padding keeps the size. The first result is (B, H·W, E) in x's dtype.
    """
    maps = x.float().unflatten(1, (height, width)).permute(0, 3, 1, 2)
    padding = (weight.shape[1] // 2, weight.shape[2] // 2)
    kernel, start = weight.float().unsqueeze(1), None if bias is None else bias.float()
    y = F.silu(F.conv2d(maps, kernel, start, padding=padding, groups=weight.shape[0]))
    y = y.permute(0, 2, 3, 1).flatten(1, 2)
    _, codes = _with_codes(y.unsqueeze(0), inv_scale, zero_point, inv_smooth, bits, x.dtype)
    return y.to(x.dtype).contiguous(), codes


def _with_codes(
    y: Tensor, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    smooth = None if inv_smooth is None else inv_smooth[:, None, None]
    codes = reference.quantize(y, inv_scale.unsqueeze(1), zero_point.unsqueeze(1), smooth, bits)
    return y.to(dtype), codes.contiguous()


def directional_scan(
    u: Tensor,
    projected: Tensor,
    step_inv_scale: Tensor,
    step_scale: Tensor,
    step_zero_point: Tensor,
    step_inv_smooth: Tensor | None,
    step_bits: int,
    step_weight: Tensor,
    step_weight_sum: Tensor,
    step_weight_scale: Tensor,
    step_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    order: Tensor,
    merge: bool,
    factor: float,
) -> Tensor:
    """Selective scans along K orders, from the projections of their inputs on; gated by SiLU of z, times `factor`.

    u (K, B, L, E), or (1, B, L, E) for all directions; projected (K, B, L, R + 2S) float32 is [low-rank step | B | C].
    The step is quantized with qparams (K, L), smoothing (K, R), and goes through the integer linear of packed weights
    (K, E, R) with scales (K, E). step_bias, D (K, E); A (K, E, S); z (B, L, E). `merge` gives the sum of all directions
    (B, L, E), else each is given (K, B, L, E), in u's dtype.
    """
    states, outputs = A.shape[-1], []
    low_rank, B, C = projected.float().split((projected.shape[-1] - 2 * states, states, states), -1)
    gate = factor if z is None else F.silu(z.float()) * factor
    for k, tokens in enumerate(order.long().unbind(0)):
        smooth = None if step_inv_smooth is None else step_inv_smooth[k]
        codes = reference.quantize(low_rank[k], step_inv_scale[k], step_zero_point[k], smooth, step_bits)
        packed = (step_weight[k], step_weight_sum[k], step_weight_scale[k], None)
        delta = linear_packed(codes, step_scale[k], step_zero_point[k], *packed, torch.float32)
        skip = None if D is None else D[k]
        x = u[k if len(u) > 1 else 0].float()
        x_k, delta_k, B_k, C_k = (_read(value, tokens) for value in (x, delta, B[k], C[k]))
        y = reference.selective_scan(x_k, delta_k, A[k], B_k, C_k, skip, None, step_bias[k], True)
        places = torch.where(tokens < 0, x.shape[1], tokens)  # a mask would make a GPU wait for the host
        natural = F.pad(torch.zeros_like(x), (0, 0, 0, 1)).index_copy_(1, places, y)[:, :-1]
        outputs.append(natural if merge else natural * gate)
    y = sum(outputs[1:], outputs[0]) * gate if merge else torch.stack(outputs)
    return y.to(u.dtype).contiguous()


def directional_scan_quantize(
    u: Tensor,
    projected: Tensor,
    step_inv_scale: Tensor,
    step_scale: Tensor,
    step_zero_point: Tensor,
    step_inv_smooth: Tensor | None,
    step_bits: int,
    step_weight: Tensor,
    step_weight_sum: Tensor,
    step_weight_scale: Tensor,
    step_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    order: Tensor,
    factor: float,
    inv_scale: Tensor,
    zero_point: Tensor,
    inv_smooth: Tensor | None,
    bits: int,
) -> Tensor:
    """The codes (B, L, E) of the merged `directional_scan`; inv_scale and zero_point (L,) or (1,), inv_smooth (E,)."""
    scan = (u.float(), projected, step_inv_scale, step_scale, step_zero_point, step_inv_smooth, step_bits, step_weight)
    y = directional_scan(*scan, step_weight_sum, step_weight_scale, step_bias, A, D, z, order, True, factor)
    return reference.quantize(y, inv_scale, zero_point, inv_smooth, bits)


def _read(x: Tensor, tokens: Tensor) -> Tensor:
    """x (B, L, C) at the tokens (T,), zeros where there is none."""
    return torch.where((tokens >= 0)[:, None], x[:, tokens.clamp(min=0)], 0.0)
