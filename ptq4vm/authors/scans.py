"""`selective_scan_fn` of mamba_ssm and of its forks, on `ptq4vm::selective_scan`.

Shapes: u, delta, z (B, E, L); A (E, S); B, C (B, S, L) or, for G groups of E/G channels each, (B, G, S, L); D and
delta_bias (E,). States are float32 and results have u's dtype, as in the originals.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ptq4vm import ops

_Group = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool | None = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes the selective scan (B, E, L); also the states after the last token (B, E, S), where asked for."""
    y = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, last_state(u, delta, A, B, delta_bias, delta_softplus)) if return_last_state else y


def selective_scan_without_gate(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
) -> Tensor:
    """Computes the selective scan, with the signature of the package `selective_scan`; `nrows` tunes its kernel."""
    return scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def scan(
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
    """Computes the selective scan (B, E, L), one operator a group."""
    results = [
        ops.selective_scan(*group, delta_softplus).transpose(1, 2)
        for group in _groups(u, delta, A, B, C, D, z, delta_bias)
    ]
    return results[0] if len(results) == 1 else torch.cat(results, 1)


def last_state(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """Returns the states after the last token (B, E, S), in float32."""
    return scan_states(u, delta, A, B, delta_bias, delta_softplus)[..., -1]


def scan_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """Returns the states of all tokens (B, E, S, L), in float32: the scans of each state alone, with C = 1."""
    ones = torch.ones_like(B.narrow(-2, 0, 1))
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    states = [
        scan(u, delta, A[:, s : s + 1], B.narrow(-2, s, 1), ones, None, None, delta_bias, delta_softplus)
        for s in range(A.shape[1])
    ]
    return torch.stack(states, 2)


def _groups(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> Iterator[_Group]:
    """Yields the inputs of `ptq4vm::selective_scan`, tokens before channels, for each group."""
    if A.is_complex():
        raise NotImplementedError("ptq4vm's selective scan has no complex A: Visual Mambas have a real one")
    for name, value in (("B", B), ("C", C)):
        if value.dim() not in (3, 4):
            raise NotImplementedError(
                f"{name} of shape {tuple(value.shape)}: ptq4vm's selective scan takes a {name} that depends on the "
                "input, (B, S, L) or (B, G, S, L), and no constant one"
            )
    counts = [value.shape[1] if value.dim() == 4 else 1 for value in (B, C)]
    count = max(counts)
    if A.shape[0] % count or {*counts} - {1, count}:
        raise ValueError(f"{A.shape[0]} channels cannot be divided among {counts[0]} groups of B and {counts[1]} of C")

    def parts(value: Tensor | None, axis: int) -> Sequence[Any]:
        return [value] * count if value is None or count == 1 else value.chunk(count, axis)

    def tokens(value: Tensor | None) -> Sequence[Any]:
        return parts(None if value is None else value.transpose(1, 2), -1)

    def mixing(value: Tensor) -> Sequence[Tensor]:
        groups = value.transpose(-1, -2).unbind(1) if value.dim() == 4 else [value.transpose(-1, -2)]
        return groups if len(groups) == count else [*groups] * count

    channels = parts(A, 0), mixing(B), mixing(C), parts(D, 0), tokens(z), parts(delta_bias, 0)
    yield from zip(tokens(u), tokens(delta), *channels, strict=True)
