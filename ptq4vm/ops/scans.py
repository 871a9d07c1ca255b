"""Mamba's selective scan: forward, adjoint, and with its state kept as integers.

Shapes: B images, L tokens, E channels, S states. u, delta, z (B, L, E); A (E, S) negative; B, C (B, L, S); D and
delta_bias (E,); the result is (B, L, E). Computed in float32 (float64 for float64 inputs) and returned in u's dtype.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.ops._define import adjoint, define, empty_gradient, like
from ptq4vm.ops.convolution_1d import silu_slope
from ptq4vm.ops.quantization import code_range

SCAN_CHUNK = 2**19
"""States (B · S · E · tokens) that a scan holds at once: 2 MiB, so that they stay in cache."""

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus"
)
_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool]
_SHAPES = (
    "u float B L E; delta float B L E; A float E S; B float B L S; C float B L S; D float E; z float B L E; "
    "delta_bias float E"
)


class _Recurrence:
    """A scan's inputs in the type that it computes in, tokens first: Δ and what it makes of u (L, B, E), A, B, h_0."""

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool
    ) -> None:
        kind = torch.promote_types(u.dtype, torch.float32)
        raw_dt = delta.to(kind) if delta_bias is None else delta.to(kind) + delta_bias.to(kind)
        self.raw_dt = raw_dt.transpose(0, 1).contiguous()
        self.dt = F.softplus(self.raw_dt) if delta_softplus else self.raw_dt
        self.dt_u = self.dt * u.to(kind).transpose(0, 1)
        self.a, self.b = A.to(kind).t(), B.to(kind).transpose(0, 1)  # (S, E), (L, B, S)
        self.start = self.dt.new_zeros(u.shape[0], A.shape[1], A.shape[0])  # (B, S, E)

    def chunks(self) -> list[slice]:
        tokens = len(self.dt)
        length = max(1, SCAN_CHUNK // max(1, self.start.numel()))
        return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]

    def run(self, chunk: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns decays and states (T, B, S, E) of the T tokens of a chunk, which follow the state h (B, S, E)."""
        decay = torch.exp_(self.dt[chunk].unsqueeze(-2) * self.a)
        states = self.dt_u[chunk].unsqueeze(-2) * self.b[chunk].unsqueeze(-1)
        for state, factor in zip(states.unbind(0), decay.unbind(0), strict=True):
            h = state.addcmul_(factor, h)
        return decay, states

    def states(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields chunks and the states (T, B, S, E) of their tokens."""
        h = self.start
        for chunk in self.chunks():
            _, states = self.run(chunk, h)
            h = states[-1].clone()  # and not the whole chunk's memory
            yield chunk, states


def selective_scan(*inputs: *_Inputs) -> Tensor:
    """Computes the selective scan, tokens before channels (Gu and Dao 2023, algorithm 2, with B̄ = Δ · B).

        Δ_t = softplus(delta_t + delta_bias)
        h_t = exp(Δ_t · A) · h_{t-1} + Δ_t · B_t · u_t,   h_0 = 0
        y_t = (Σ_s C_t · h_t + D · u_t) · silu(z_t)

    Within a chunk of tokens everything but the recurrence is one vector operation; the recurrence is one fused
    multiply-add a token.
    """
    u, delta, A, B, C, D, z, delta_bias, delta_softplus = inputs
    scan = _Recurrence(u, delta, A, B, delta_bias, delta_softplus)
    y, c = torch.empty_like(scan.dt), C.to(scan.dt.dtype).transpose(0, 1)
    for chunk, states in scan.states():
        y[chunk] = _sum_states(c[chunk], states)
    return _gate(_skip(y, u, D), z).to(u.dtype).contiguous()


def scan_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> Iterator[Tensor]:
    """Yields the states h_t of `selective_scan`, (tokens, B, S, E) for chunks of tokens."""
    for _, states in _Recurrence(u, delta, A, B, delta_bias, delta_softplus).states():
        yield states


def _sum_states(weights: Tensor, states: Tensor) -> Tensor:
    """(T, B, S), (T, B, S, E) → (T, B, E)."""
    return torch.matmul(weights.unsqueeze(-2), states).squeeze(-2)


def _skip(y: Tensor, u: Tensor, D: Tensor | None) -> Tensor:
    """Adds D · u to y (L, B, E); the result is (B, L, E)."""
    y = y.transpose(0, 1)
    return y if D is None else y + u.to(y.dtype) * D.to(y.dtype)


def _gate(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else y * F.silu(z.to(y.dtype))


def _quantized_fake(u: Tensor, *rest: Any) -> Tensor:
    state_scale = rest[8]
    if state_scale.dim() != 1 or state_scale.shape[0] not in (1, u.shape[1]):
        raise ValueError(
            f"state scales of shape {tuple(state_scale.shape)} were calibrated for another number of tokens than the "
            f"{u.shape[1]} of this scan; calibrate at this resolution"
        )
    return u.new_empty(u.shape)


def selective_scan_quantized(*inputs: *tuple[*_Inputs, Tensor, Tensor, int]) -> Tensor:
    """Computes `selective_scan` with its state kept as integers of `bits` bits from one token to the next.

    `state_scale` and its reciprocal are (L,), one per token, or (1,):

        v_t = exp(Δ_t · A) · h_{t-1} + Δ_t · B_t · u_t,   h_0 = 0
        y_t = (Σ_s C_t · v_t + D · u_t) · silu(z_t)
        q_t = clamp(round_half_even(v_t · inv_scale[t]), -2^(b-1), 2^(b-1) - 1),   h_t = q_t · scale[t]

    y_t is read before v_t is rounded, so the recurrence alone sees the rounding (k-scaled paper, "hidden state"); q_t
    is all that a token hands to the next.
    """
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, state_scale, state_inv_scale, bits = inputs
    scan = _Recurrence(u, delta, A, B, delta_bias, delta_softplus)
    h, y, c = scan.start, torch.empty_like(scan.dt), C.to(scan.dt.dtype).transpose(0, 1)
    scales, inverses = (value.to(y.dtype).expand(len(y)) for value in (state_scale, state_inv_scale))
    for t in range(len(y)):
        v = torch.exp(scan.dt[t].unsqueeze(-2) * scan.a) * h + scan.dt_u[t].unsqueeze(-2) * scan.b[t].unsqueeze(-1)
        y[t] = _sum_states(c[t], v)
        h = torch.round(v * inverses[t]).clamp(*code_range(bits)) * scales[t]
    return _gate(_skip(y, u, D), z).to(u.dtype).contiguous()


def _backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    default = grad.new_empty(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    return tuple(empty_gradient(tensor, default) for tensor in inputs[:8])


def selective_scan_backward(grad: Tensor, *inputs: *_Inputs) -> tuple[Tensor, ...]:
    """Returns gradients of u, delta, A, B, C, D, z and delta_bias, empty where absent: the adjoint of `selective_scan`.

    With λ_t the gradient of h_t: λ_t = C_t · g_t + exp(Δ_{t+1} A) · λ_{t+1}, backwards. The states are computed
    again, chunk by chunk, from those at the chunks' starts.
    """
    u, delta, A, B, C, D, z, delta_bias, delta_softplus = inputs
    scan = _Recurrence(u, delta, A, B, delta_bias, delta_softplus)
    kind, empty = scan.dt.dtype, scan.dt.new_empty
    g = grad.to(kind) if z is None else grad.to(kind) * F.silu(z.to(kind))
    y, grad_dt, grad_dt_u, grad_a, grad_b, grad_c = _recurrence_adjoint(
        scan, C.to(kind).transpose(0, 1), g.transpose(0, 1).contiguous()
    )
    grad_dt += grad_dt_u * u.to(kind).transpose(0, 1)
    grad_delta = (grad_dt * torch.sigmoid(scan.raw_dt) if delta_softplus else grad_dt).transpose(0, 1)
    grad_u = (grad_dt_u * scan.dt).transpose(0, 1)
    grads = (
        grad_u if D is None else grad_u + g * D.to(kind),
        grad_delta,
        grad_a.t(),
        grad_b.transpose(0, 1),
        grad_c.transpose(0, 1),
        empty(0) if D is None else (g * u.to(kind)).sum((0, 1)),
        empty(0) if z is None else grad.to(kind) * _skip(y, u, D) * silu_slope(z.to(kind)),
        empty(0) if delta_bias is None else grad_delta.sum((0, 1)),
    )
    return tuple(g if x is None else g.to(x.dtype).contiguous() for g, x in zip(grads, inputs[:8], strict=True))


def _recurrence_adjoint(scan: _Recurrence, c: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Returns Σ_s C_t · h_t, and the gradients of Δ where it decays states, of Δ · u, A, B and C, tokens first."""
    chunks, starts = scan.chunks(), [scan.start]
    for chunk in chunks[:-1]:
        starts.append(scan.run(chunk, starts[-1])[1][-1].clone())
    y, grad_dt, grad_dt_u = (torch.empty_like(scan.dt) for _ in range(3))
    grad_a, grad_b, grad_c = torch.zeros_like(scan.a), torch.empty_like(scan.b), torch.empty_like(c)
    carry = torch.zeros_like(scan.start)
    for chunk, start in reversed(list(zip(chunks, starts, strict=False))):
        decay, states = scan.run(chunk, start)
        y[chunk] = _sum_states(c[chunk], states)
        grad_c[chunk] = _sum_channels(states, g[chunk])
        grad_h = c[chunk].unsqueeze(-1) * g[chunk].unsqueeze(-2)
        grad_h[-1] += carry
        later, factors = grad_h.unbind(0), decay.unbind(0)
        for t in reversed(range(len(later) - 1)):
            later[t].addcmul_(factors[t + 1], later[t + 1])
        carry = grad_h[0] * decay[0]
        grad_b[chunk] = _sum_channels(grad_h, scan.dt_u[chunk])
        grad_dt_u[chunk] = _sum_states(scan.b[chunk], grad_h)
        grad_h[1:] *= states[:-1]
        grad_h[0] *= start
        grad_log_decay = grad_h.mul_(decay)
        grad_dt[chunk] = (grad_log_decay * scan.a).sum(-2)
        grad_a += (grad_log_decay * scan.dt[chunk].unsqueeze(-2)).sum((0, 1))
    return y, grad_dt, grad_dt_u, grad_a, grad_b, grad_c


def _sum_channels(states: Tensor, values: Tensor) -> Tensor:
    """(T, B, S, E), (T, B, E) → (T, B, S)."""
    return torch.matmul(states, values.unsqueeze(-1)).squeeze(-1)


define(
    f"selective_scan({_INPUTS}) -> Tensor", selective_scan, _SHAPES, like, gradient=adjoint("selective_scan_backward")
)
define(
    f"selective_scan_quantized({_INPUTS}, Tensor state_scale, Tensor state_inv_scale, int bits) -> Tensor",
    selective_scan_quantized,
    f"{_SHAPES}; state_scale float L|1; state_inv_scale float =state_scale; bits bits",
    _quantized_fake,
    gradient=adjoint("selective_scan_backward"),
)
define(
    f"selective_scan_backward(Tensor grad, {_INPUTS}) -> ({', '.join(['Tensor'] * 8)})",
    selective_scan_backward,
    f"{_SHAPES}; grad float B L E",
    _backward_fake,
)
