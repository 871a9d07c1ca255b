"""The meaning of every kernel, in plain PyTorch, and the default implementation of every op.

Shapes: B images, L tokens, D channels in, N channels out; in scans and convolutions E channels, S states, K taps.
An activation x is (B, L, D). Its qparams are one per token (L,), one per tensor (1,), or one per image and token
(B, L): they broadcast against x without its last axis. Weights are (N, D) with one scale per output channel (N,).
Codes are signed: [-2^(b-1), 2^(b-1) - 1] for activations, [1 - 2^(b-1), 2^(b-1) - 1] for weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.specs import IntegerRange

EPSILON = torch.finfo(torch.float32).tiny
"""The smallest scale whose reciprocal is finite: a tensor of zeros still has one."""

EXACT_CHANNELS = 1024
"""So many products of two int8 codes sum exactly in float32: 1024 · 128 · 128 = 2^24."""

LARGEST_HARTLEY = 15
"""Odd factors of the number of channels that a rotation mixes; the kernel has the same number."""

SCAN_CHUNK = 2**19
"""States (B · S · E · tokens) that a scan holds at once: 2 MiB, so that they stay in cache."""


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int) -> Tensor:
    """Smooth, multiply by the reciprocal, round half to even, shift, clamp; int8 codes in x's shape."""
    low, high = IntegerRange(bits=bits, narrow_range=False).bounds
    return unclamped_codes(x, inv_scale, zero_point, inv_smooth).clamp(low, high).to(torch.int8)


def unclamped_codes(x: Tensor, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None) -> Tensor:
    """The codes of `quantize` before they are clamped, float32."""
    v = x.float()
    if inv_smooth is not None:
        v = v * inv_smooth.float()
    return torch.round(v * _along_channels(inv_scale.float(), x)) + _along_channels(zero_point, x)


def _along_channels(qparams: Tensor, x: Tensor) -> Tensor:
    """Qparams that broadcast against x; of an x (D,) without tokens there are (1,)."""
    return qparams if qparams.dim() >= x.dim() else qparams.unsqueeze(-1)


def dequantize(x_q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(q - z) · scale in float32."""
    return (x_q.float() - _along_channels(zero_point, x_q)) * _along_channels(scale.float(), x_q)


def rotate(x: Tensor) -> Tensor:
    """x (…, D) times an orthogonal matrix that is its own inverse; in x's type, computed in float32.

    Of D = m · 2^a channels: Hadamard's transform of each run of 2^a, then Hartley's over the m runs if m is at most
    `LARGEST_HARTLEY` (QuaRot, Ashkboos et al. 2024, has Hadamard matrices of both sizes).
    """
    order = max(1, x.shape[-1] & -x.shape[-1])
    size = x.shape[-1] // order
    y = x.float().unflatten(-1, (size, order)) @ hadamard(order, x.device)
    if size <= LARGEST_HARTLEY:
        y = hartley(size, x.device) @ y
    return y.flatten(-2).to(x.dtype)


def hadamard(order: int, device: torch.device | None = None) -> Tensor:
    """Sylvester's matrix (order, order) for a power of two, orthonormal."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(order)


def hartley(size: int, device: torch.device | None = None) -> Tensor:
    """cos(2πjk / size) + sin(2πjk / size), (size, size), orthonormal and symmetric."""
    steps = torch.arange(size, dtype=torch.float64, device=device)
    angles = 2 * math.pi / max(1, size) * (steps.unsqueeze(1) * steps)
    return ((angles.cos() + angles.sin()) / math.sqrt(max(1, size))).float()


def quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Symmetric int8 codes (N, D) of an already smoothed weight (N, D), one scale per output channel (N,)."""
    low, high = IntegerRange(bits=bits, narrow_range=True).bounds
    return torch.round(weight.float() / scale.unsqueeze(-1)).clamp(low, high).to(torch.int8)


def affine_qparams(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) of the range [min(low, 0), max(high, 0)], elementwise.

    The zero point of a range that is not finite is 0, so that its codes stand for NaN.
    """
    code_low, code_high = IntegerRange(bits=bits, narrow_range=False).bounds
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = ((high - low) / (code_high - code_low)).clamp(min=EPSILON)
    zero_point = (code_low - torch.round(low / scale)).clamp(code_low, code_high)
    return scale, zero_point.nan_to_num(0.0).to(torch.int32)


def choose_qparams(x: Tensor, inv_smooth: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (B, L) of every token of x (B, L, D) from its own minimum and maximum."""
    v = x.float() if inv_smooth is None else x.float() * inv_smooth.float()
    return affine_qparams(v.amin(-1), v.amax(-1), bits)


def accumulate(x_q: Tensor, x_zero_point: Tensor, w_q: Tensor) -> Tensor:
    """Σ q · w - z · Σ w as int32 (…, N) from int8 codes. A kernel that differs here by one is wrong.

    The products run through a float32 matmul in pieces of `EXACT_CHANNELS`, which is exact in any order of
    summation, and fast everywhere; int32 matmul has no kernel on CPUs.
    """
    acc = torch.zeros(*x_q.shape[:-1], w_q.shape[0], dtype=torch.int32, device=x_q.device)
    for x, w in zip(x_q.split(EXACT_CHANNELS, -1), w_q.split(EXACT_CHANNELS, -1), strict=True):
        acc += F.linear(x.float(), w.float()).to(torch.int32)
    return acc - _along_channels(x_zero_point.to(torch.int32), x_q) * w_q.sum(-1, dtype=torch.int32)


def rescale(acc: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(float32(acc) · scale_x[t]) · scale_w[n] + bias[n], then one cast."""
    y = (acc.float() * _along_channels(x_scale.float(), acc)) * w_scale.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def linear(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The integer linear: int8 codes (…, D), weight int8 (N, D) or packed 4-bit uint8 (N, ceil(D / 2))."""
    w_q = unpack_int4(weight, x_q.shape[-1]) if weight.dtype == torch.uint8 else weight
    return rescale(accumulate(x_q, x_zero_point, w_q), x_scale, weight_scale, bias, dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes a byte along the last axis, low nibble first; an odd axis is padded with a zero code."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return ((codes[..., 1::2] << 4) | (codes[..., 0::2] & 15)).to(torch.uint8)


def unpack_int4(packed: Tensor, channels: int) -> Tensor:
    """int8 codes (…, channels): the inverse of `pack_int4`."""
    low, high = (packed & 15).to(torch.int8), (packed >> 4).to(torch.int8)
    codes = torch.stack((low, high), -1).flatten(-2)[..., :channels]
    return torch.where(codes > 7, codes - 16, codes)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, smooth: Tensor | None, bits: int) -> Tensor:
    """What x · smooth is after `quantize` and `dequantize`, or, without zero points, after `quantize_weight`."""
    _, _, clamped = _fake_codes(x, scale, zero_point, smooth, bits)
    return (clamped * _along_channels(scale.float(), x)).to(x.dtype).contiguous()


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    smooth: Tensor | None,
    bits: int,
    need_x: bool,
    need_scale: bool,
    need_zero_point: bool,
    need_smooth: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Straight-through gradients of x, scale, zero_point and smooth, empty where not needed.

    Rounding has the identity's gradient wherever the rounded code is in range, both ends included; not `clamp`'s,
    which is zero at the ends: the last codes would never learn. So the scale's is that of LSQ (Esser et al. 2020), and
    the zero point's that of LSQ+ (Bhalgat et al. 2020): only values out of range move with it.
    """
    v, codes, clamped = _fake_codes(x, scale, zero_point, smooth, bits)
    grad, inside, whole = grad.float(), codes == clamped, scale.dim() >= x.dim()
    through = torch.where(inside, grad, 0)
    grad_x, grad_scale, grad_zero_point, grad_smooth = (grad.new_empty(0) for _ in range(4))
    if need_x:
        grad_x = (through if smooth is None else through * smooth.float()).contiguous()
    if need_scale:
        grad_scale = (grad * (clamped - torch.where(inside, v, 0))).sum(-1, whole).sum_to_size(scale.shape)
    if need_zero_point:
        grad_zero_point = (-scale.float() * torch.where(inside, 0, grad).sum(-1, whole)).sum_to_size(scale.shape)
    if need_smooth:
        by_row = through * x.float()
        grad_smooth = by_row.flatten(0, -2).sum(0) if x.dim() > 1 else by_row
    return (
        grad_x.to(x.dtype),
        grad_scale.to(scale.dtype),
        grad_zero_point,
        grad_smooth.to(x.dtype if smooth is None else smooth.dtype),
    )


def _fake_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, smooth: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The value to round, its code less the zero point, and this code in range; all float32."""
    v, scale = x.float(), _along_channels(scale.float(), x)
    if smooth is not None:
        v = v * smooth.float()
    if zero_point is None:
        v, zero = v / scale, torch.zeros_like(scale)
    else:
        v, zero = v * (1.0 / scale), _along_channels(zero_point.float(), x)
    low, high = IntegerRange(bits=bits, narrow_range=zero_point is None).bounds
    codes = v.round()
    return v, codes, codes.clamp(low - zero, high - zero)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Depth-wise y_t = b + Σ_k w_k · x_{t-K+1+k}, zeros before t = 0; x (B, L, E), weight (E, K), bias (E,).

    Computed in float32 (float64 for float64 inputs) and returned in x's dtype.
    """
    y = _causal_taps(*_in_one_type(x, weight, bias))
    return (F.silu(y) if silu else y).to(x.dtype).contiguous()


def _in_one_type(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    kind = torch.promote_types(x.dtype, torch.float32)
    return x.to(kind), *(None if value is None else value.to(kind) for value in others)


def _causal_taps(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    taps, tokens = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = padded[:, :tokens] * weight[:, 0]
    for k in range(1, taps):
        y = torch.addcmul(y, padded[:, k : k + tokens], weight[:, k])
    return y if bias is None else y + bias


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty without a bias), each in its dtype: the adjoint of `causal_conv1d`."""
    dtypes, taps, tokens = (x.dtype, weight.dtype), weight.shape[1], x.shape[1]
    bias_dtype = grad.dtype if bias is None else bias.dtype
    x, grad, weight, bias = _in_one_type(x, grad, weight, bias)
    if silu:
        grad = grad * _silu_slope(_causal_taps(x, weight, bias))
    x_padded, grad_padded = F.pad(x, (0, 0, taps - 1, 0)), F.pad(grad, (0, 0, 0, taps - 1))
    grad_x = grad_padded[:, taps - 1 : taps - 1 + tokens] * weight[:, 0]
    for k in range(1, taps):
        grad_x = torch.addcmul(grad_x, grad_padded[:, taps - 1 - k : taps - 1 - k + tokens], weight[:, k])
    grad_weight = torch.stack([(grad * x_padded[:, k : k + tokens]).sum((0, 1)) for k in range(taps)], -1)
    grad_bias = grad.new_empty(0) if bias is None else grad.sum((0, 1))
    return grad_x.to(dtypes[0]).contiguous(), grad_weight.to(dtypes[1]), grad_bias.to(bias_dtype)


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def selective_scan(
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
    """Mamba's selective scan, tokens before channels (Gu and Dao 2023, algorithm 2, with B̄ = Δ · B).

    u, delta, z (B, L, E); A (E, S) negative; B, C (B, L, S); D, delta_bias (E,); the result is (B, L, E):

        Δ_t = softplus(delta_t + delta_bias)
        h_t = exp(Δ_t · A) · h_{t-1} + Δ_t · B_t · u_t,   h_0 = 0
        y_t = (Σ_s C_t · h_t + D · u_t) · silu(z_t)

    Computed in float32 (float64 for float64 inputs) and returned in u's dtype. Within a chunk of tokens everything
    but the recurrence is one vector operation; the recurrence is one fused multiply-add a token.
    """
    step, dt_u, _ = _scan_steps(u, delta, delta_bias, delta_softplus)
    a, b, c = A.to(step.dtype).t(), B.to(step.dtype).transpose(0, 1), C.to(step.dtype).transpose(0, 1)
    h = step.new_zeros(u.shape[0], A.shape[1], A.shape[0])
    y = torch.empty_like(step)
    for chunk in _scan_chunks(u, A):
        _, states = _scan_chunk(step[chunk], dt_u[chunk], a, b[chunk], h)
        h = states[-1]
        y[chunk] = _sum_states(c[chunk], states)
    y = _skip(y.transpose(0, 1), u, D)
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(u.dtype).contiguous()


def selective_scan_quantized(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state_scale: Tensor,
    state_inv_scale: Tensor,
    bits: int,
) -> Tensor:
    """`selective_scan` whose state is kept as integers of `bits` bits from one token to the next.

    `state_scale` and its reciprocal are (L,), one per step, or (1,); the other shapes are those of `selective_scan`:

        v_t = exp(Δ_t · A) · h_{t-1} + Δ_t · B_t · u_t,   h_0 = 0
        y_t = (Σ_s C_t · v_t + D · u_t) · silu(z_t)
        q_t = clamp(round_half_even(v_t · inv_scale[t]), -2^(b-1), 2^(b-1) - 1),   h_t = q_t · scale[t]

    y_t is read before v_t is rounded, so the recurrence alone sees the rounding (k-scaled paper, "hidden state").
    Computed in float32 and returned in u's dtype; q_t is all that a step hands to the next.
    """
    low, high = IntegerRange(bits=bits, narrow_range=False).bounds
    step, dt_u, _ = _scan_steps(u, delta, delta_bias, delta_softplus)
    a, b, c = A.to(step.dtype).t(), B.to(step.dtype).transpose(0, 1), C.to(step.dtype).transpose(0, 1)
    h = step.new_zeros(u.shape[0], A.shape[1], A.shape[0])
    y = torch.empty_like(step)
    scales, inverses = (value.to(step.dtype).expand(len(step)) for value in (state_scale, state_inv_scale))
    for t in range(len(step)):
        v = torch.exp(step[t].unsqueeze(-2) * a) * h + dt_u[t].unsqueeze(-2) * b[t].unsqueeze(-1)
        y[t] = _sum_states(c[t], v)
        h = torch.round(v * inverses[t]).clamp(low, high) * scales[t]
    y = _skip(y.transpose(0, 1), u, D)
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(u.dtype).contiguous()


def scan_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> Iterator[Tensor]:
    """The states h_t of `selective_scan`, (tokens, B, S, E) for chunks of tokens."""
    step, dt_u, _ = _scan_steps(u, delta, delta_bias, delta_softplus)
    a, b = A.to(step.dtype).t(), B.to(step.dtype).transpose(0, 1)
    h = step.new_zeros(u.shape[0], A.shape[1], A.shape[0])
    for chunk in _scan_chunks(u, A):
        _, states = _scan_chunk(step[chunk], dt_u[chunk], a, b[chunk], h)
        h = states[-1].clone()
        yield states


def selective_scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias (empty where absent): the adjoint of `selective_scan`.

    With λ_t the gradient of h_t: λ_t = C_t · g_t + exp(Δ_{t+1} A) · λ_{t+1}, backwards. The states are computed
    again, chunk by chunk, from those at the chunks' starts.
    """
    step, dt_u, raw = _scan_steps(u, delta, delta_bias, delta_softplus)
    kind = step.dtype
    a, b, c = A.to(kind).t(), B.to(kind).transpose(0, 1), C.to(kind).transpose(0, 1)
    u_t, g = u.to(kind).transpose(0, 1), grad.to(kind)
    if z is not None:
        g = g * F.silu(z.to(kind))
    g_t = g.transpose(0, 1).contiguous()

    chunks = _scan_chunks(u, A)
    zeros = step.new_zeros(u.shape[0], A.shape[1], A.shape[0])
    starts = [zeros] * min(1, len(chunks))
    for chunk in chunks[:-1]:
        starts.append(_scan_chunk(step[chunk], dt_u[chunk], a, b[chunk], starts[-1])[1][-1])

    y, grad_step, grad_dt_u = torch.empty_like(step), torch.empty_like(step), torch.empty_like(step)
    grad_a, grad_b, grad_c = torch.zeros_like(a), torch.empty_like(b), torch.empty_like(c)
    carry = zeros.clone()
    for chunk, start in zip(reversed(chunks), reversed(starts), strict=True):
        decay, states = _scan_chunk(step[chunk], dt_u[chunk], a, b[chunk], start)
        y[chunk] = _sum_states(c[chunk], states)
        grad_c[chunk] = _sum_channels(states, g_t[chunk])
        adjoint = c[chunk].unsqueeze(-1) * g_t[chunk].unsqueeze(-2)
        adjoint[-1] += carry
        for now, later, factor in zip(
            reversed(adjoint.unbind(0)[:-1]),
            reversed(adjoint.unbind(0)),
            reversed(decay.unbind(0)),
            strict=False,
        ):
            now.addcmul_(factor, later)
        carry = adjoint[0] * decay[0]
        grad_b[chunk] = _sum_channels(adjoint, dt_u[chunk])
        grad_dt_u[chunk] = _sum_states(b[chunk], adjoint)
        adjoint[1:] *= states[:-1]
        adjoint[0] *= start
        grad_log_decay = adjoint.mul_(decay)
        grad_step[chunk] = (grad_log_decay * a).sum(-2)
        grad_a += (grad_log_decay * step[chunk].unsqueeze(-2)).sum((0, 1))

    grad_step += grad_dt_u * u_t
    grad_delta = (grad_step * torch.sigmoid(raw) if delta_softplus else grad_step).transpose(0, 1)
    grad_u = (grad_dt_u * step).transpose(0, 1)
    grad_z = g.new_empty(0) if z is None else grad.to(kind) * _skip(y.transpose(0, 1), u, D) * _silu_slope(z.to(kind))
    grad_D = g.new_empty(0) if D is None else (g * u.to(kind)).sum((0, 1))
    if D is not None:
        grad_u = grad_u + g * D.to(kind)

    def like(value: Tensor, original: Tensor | None) -> Tensor:
        return value if original is None else value.to(original.dtype).contiguous()

    return (
        like(grad_u, u),
        like(grad_delta, delta),
        like(grad_a.t(), A),
        like(grad_b.transpose(0, 1), B),
        like(grad_c.transpose(0, 1), C),
        like(grad_D, D),
        like(grad_z, z),
        g.new_empty(0) if delta_bias is None else like(grad_delta.sum((0, 1)), delta_bias),
    )


def _scan_steps(u: Tensor, delta: Tensor, delta_bias: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Δ, Δ · u and Δ before softplus, each (L, B, E), in the dtype to compute in."""
    kind = torch.promote_types(u.dtype, torch.float32)
    raw = delta.to(kind) if delta_bias is None else delta.to(kind) + delta_bias.to(kind)
    raw = raw.transpose(0, 1).contiguous()
    step = F.softplus(raw) if softplus else raw.clone()
    return step, step * u.to(kind).transpose(0, 1), raw


def _scan_chunks(u: Tensor, A: Tensor) -> list[slice]:
    tokens = u.shape[1]
    length = max(1, SCAN_CHUNK // max(1, u.shape[0] * A.numel()))
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def _scan_chunk(step: Tensor, dt_u: Tensor, a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states (T, B, S, E) of T tokens that follow the state h (B, S, E)."""
    decay = torch.exp_(step.unsqueeze(-2) * a)
    states = dt_u.unsqueeze(-2) * b.unsqueeze(-1)
    for state, factor in zip(states.unbind(0), decay.unbind(0), strict=True):
        h = state.addcmul_(factor, h)
    return decay, states


def _sum_states(weights: Tensor, states: Tensor) -> Tensor:
    """(T, B, S), (T, B, S, E) → (T, B, E)."""
    return torch.matmul(weights.unsqueeze(-2), states).squeeze(-2)


def _sum_channels(states: Tensor, values: Tensor) -> Tensor:
    """(T, B, S, E), (T, B, E) → (T, B, S)."""
    return torch.matmul(states, values.unsqueeze(-1)).squeeze(-1)


def _skip(y: Tensor, u: Tensor, D: Tensor | None) -> Tensor:
    return y if D is None else y + u.to(y.dtype) * D.to(y.dtype)
