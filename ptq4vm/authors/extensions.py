"""Functions of the compiled modules `selective_scan_cuda` and its kin, as Python code of the forks calls them.

A kernel's second result x (B, E, chunks, 2S) keeps, for the backward pass, what each chunk of tokens ends with: the
product of its decays, and the state, alternately. Here all tokens are one chunk, or none where no caller reads x: then
reading it raises IndexError.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.authors.refusals import refuse_arguments
from ptq4vm.authors.scans import last_state, scan, scan_states


def mamba_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """Returns y, x with the last states and, with z, y · silu(z): `selective_scan_cuda.fwd`."""
    y = scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    state = last_state(u, delta, A, B, delta_bias, delta_softplus)
    x = torch.stack((_decay(delta, A, delta_bias, delta_softplus), state), -1).flatten(2).unsqueeze(2)
    gated = [] if z is None else [scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)]
    return [y, x, *gated]


def core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """Returns y and an empty x: `fwd` of `selective_scan_cuda_core`, `_nrow` and `_ndstate`."""
    return [scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus), _no_chunks(u, A)]


def oflex_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = True,
) -> list[Tensor]:
    """Returns y, in float32 where told, and an empty x: `selective_scan_cuda_oflex.fwd`."""
    return core_fwd(_widened(u, out_float), delta, A, B, C, D, delta_bias, delta_softplus)


def oflex_states_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = True,
) -> list[Tensor]:
    """Returns the states of all tokens (B, E, S, L) and x with the last ones: `selective_scan_cuda_oflex_rh.fwd`."""
    refuse_arguments("selective_scan_cuda_oflex_rh.fwd", "states have no skip connection", D=D)
    states = scan_states(u, delta, A, B, delta_bias, delta_softplus)
    x = torch.stack((_decay(delta, A, delta_bias, delta_softplus), states[..., -1]), -1).flatten(2).unsqueeze(2)
    return [states if out_float else states.to(u.dtype), x]


def _widened(u: Tensor, out_float: bool) -> Tensor:
    return u.float() if out_float and u.dtype in (torch.float16, torch.bfloat16) else u


def _no_chunks(u: Tensor, A: Tensor) -> Tensor:
    return A.new_empty(u.shape[0], A.shape[0], 0, 2 * A.shape[1])


def _decay(delta: Tensor, A: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Returns exp(A · Σ_t Δ_t), the product of the decays of all tokens (B, E, S)."""
    dt = delta.to(A.dtype) if delta_bias is None else delta.to(A.dtype) + delta_bias.unsqueeze(-1)
    return torch.exp((F.softplus(dt) if delta_softplus else dt).sum(-1).unsqueeze(-1) * A)
