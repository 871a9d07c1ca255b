"""The selective scan of mamba_ssm, token by token in float64, and what the fused functions around it compute.

Shapes: u, delta, z (B, E, L); A (E, S); B, C (B, G, S, L) or (B, S, L); D, delta_bias (E,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.strategies import normal

IMAGES, STATES = 2, 3


def drawn(groups, tokens=7, width=2, *, per_group=True, seed=0, dtype=torch.float64):
    """Returns u, delta, A, B, C, D, z, delta_bias: what `selective_scan_fn` takes."""
    channels = groups * width

    def values(*shape):
        values.seed += 1
        return normal(*shape, seed=1000 * seed + values.seed, dtype=torch.float64).to(dtype)

    values.seed = 0
    inside = (IMAGES, groups, STATES, tokens) if per_group else (IMAGES, STATES, tokens)
    u, delta, z = (values(IMAGES, channels, tokens) for _ in range(3))
    A = -values(channels, STATES).to(torch.promote_types(dtype, torch.float32)).exp()
    return u, delta, A, values(*inside), values(*inside), values(channels), z, values(channels)


def states_of(u, delta, A, B, delta_bias=None, delta_softplus=False) -> Tensor:
    """h_t for all tokens, (B, E, S, L)."""
    u, delta, A, B = u.double(), delta.double(), A.double(), per_channel(B, u.shape[1]).double()
    dt = delta if delta_bias is None else delta + delta_bias.double()[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    h, states = torch.zeros(*u.shape[:2], A.shape[1], dtype=torch.float64), []
    for t in range(u.shape[-1]):
        h = torch.exp(dt[..., t, None] * A) * h + (dt[..., t] * u[..., t])[..., None] * B[..., t]
        states.append(h)
    return torch.stack(states, -1)


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> Tensor:
    """y (B, E, L) in float64."""
    y = (states_of(u, delta, A, B, delta_bias, delta_softplus) * per_channel(C, u.shape[1]).double()).sum(2)
    y = y if D is None else y + D.double()[:, None] * u.double()
    return y if z is None else y * F.silu(z.double())


def per_channel(value: Tensor, channels: int) -> Tensor:
    """B or C for each channel, (B, E, S, L)."""
    value = value.unsqueeze(1) if value.dim() == 3 else value
    return value.repeat_interleave(channels // value.shape[1], 1)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The causal depth-wise convolution of x (B, E, L) with weights (E, taps), in float64."""
    padded, bias = F.pad(x.double(), (weight.shape[1] - 1, 0)), None if bias is None else bias.double()
    return F.conv1d(padded, weight.double().unsqueeze(1), bias, groups=weight.shape[0])
