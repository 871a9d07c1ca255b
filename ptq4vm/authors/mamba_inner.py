"""The fused inner functions of mamba_ssm and of Vim's fork: convolution, projections, scan and gate of one mixer.

Shapes: xz (B, 2E, L), conv1d_weight (E, 1, taps), x_proj_weight (R + 2S, E) for dt of rank R, delta_proj_weight
(E, R), A (E, S). `checkpoint_lvl` says what the backward pass computes again, and changes nothing here.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ptq4vm import ops


@dataclass(frozen=True)
class _Projected:
    """The inputs of a scan, tokens before channels."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor

    def scan(self, A: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
        if A.is_complex():
            raise NotImplementedError("ptq4vm's selective scan has no complex A: Visual Mambas have a real one")
        return ops.selective_scan(self.u, self.delta, A, self.B, self.C, D, self.z, delta_bias, delta_softplus)

    def reversed(self) -> "_Projected":
        return _Projected(*(value.flip(1) for value in (self.u, self.delta, self.B, self.C, self.z)))


def _project(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
) -> _Projected:
    x, z = xz.transpose(1, 2).chunk(2, -1)
    u = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, True)
    rank = delta_proj_weight.shape[1]
    states = (x_proj_weight.shape[0] - rank) // 2
    dt, own_b, own_c = F.linear(u, x_proj_weight).split([rank, states, states], -1)
    return _Projected(
        u,
        F.linear(dt, delta_proj_weight),
        _of_input("B", B, own_b, B_proj_bias),
        _of_input("C", C, own_c, C_proj_bias),
        z,
    )


def _of_input(name: str, given: Tensor | None, projected: Tensor, bias: Tensor | None) -> Tensor:
    if given is not None:
        raise NotImplementedError(
            f"ptq4vm's stand-ins for mamba_inner_fn and its kin compute {name} from the input: {name} must be None"
        )
    return projected if bias is None else projected + bias.to(projected.dtype)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Returns a mixer's (B, E, L) before its output projection."""
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    projected = _project(xz, *weights, B, C, B_proj_bias, C_proj_bias)
    return projected.scan(A, D, delta_bias, delta_softplus).transpose(1, 2)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Returns a mixer's (B, L, D); with the rms weights, Δ, B and C are normalized before the scan."""
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    projected = _project(xz, *weights, B, C, B_proj_bias, C_proj_bias)
    normalized = _Projected(
        projected.u,
        _normalized(projected.delta, dt_rms_weight, b_c_dt_rms_eps),
        _normalized(projected.B, b_rms_weight, b_c_dt_rms_eps),
        _normalized(projected.C, c_rms_weight, b_c_dt_rms_eps),
        projected.z,
    )
    return F.linear(normalized.scan(A, D, delta_bias, delta_softplus), out_proj_weight, out_proj_bias)


def _normalized(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.rms_norm(x, weight.shape, weight, eps)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Returns (B, L, D) of Vim's first version: the same inputs scanned in both directions, and the sum."""
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    projected = _project(xz, *weights, B, C, B_proj_bias, C_proj_bias)
    forward = projected.scan(A, D, delta_bias, delta_softplus)
    backward = projected.reversed().scan(A_b, D, delta_bias, delta_softplus)
    return F.linear(forward + backward.flip(1), out_proj_weight, out_proj_bias)
