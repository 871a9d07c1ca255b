"""Rounding that knows the inputs: GPTQ (Frantar et al. 2023) on the activations that the integer model has.

Shapes: x, x̂ (rows, D) the input in floating point and as the quantized model sees it, both divided by s; W (N, D)
times s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vm.config import QuantSpec

DAMPING = 0.1
"""Added to the diagonal of x̂ᵀx̂, as a share of its mean."""


class Moments:
    """x̂ᵀx̂ and xᵀx̂ of all rows, added up piece by piece in float64."""

    def __init__(self, channels: int) -> None:
        self.own = torch.zeros(channels, channels, dtype=torch.float64)
        self.cross = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, x: Tensor, seen: Tensor) -> None:
        """x and x̂ (images, L, D) of the same images."""
        exact, rounded = x.flatten(0, -2).float(), seen.flatten(0, -2).float()
        self.own += (rounded.t() @ rounded).double()
        self.cross += (exact.t() @ rounded).double()

    def damped(self) -> Tensor:
        diagonal = self.own.diagonal()
        return self.own + torch.eye(len(diagonal), dtype=torch.float64) * (DAMPING * diagonal.mean()).clamp(min=1e-12)


def compensated_weight(weight: Tensor, moments: Moments) -> Tensor:
    """The W' (N, D) whose products with x̂ come nearest to W's with x: W' = W + W (xᵀx̂ - x̂ᵀx̂) (x̂ᵀx̂ + damping)⁻¹."""
    change = torch.linalg.solve(moments.damped(), (moments.cross - moments.own).t())
    return (weight.double() + weight.double() @ change.t()).float()


def gptq_latent(weight: Tensor, scale: Tensor, spec: QuantSpec, moments: Moments) -> Tensor:
    """What is to be rounded to codes (N, D): channels one after another, each one's error moved onto those that follow.

    Channels with the largest inputs come first (GPTQ section 3.3 and its "act order").
    """
    order = moments.own.diagonal().argsort(descending=True, stable=True)
    hessian = moments.damped()[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rest = weight.double()[:, order]
    step, (low, high) = scale.double(), spec.bounds
    for channel in range(weight.shape[1]):
        codes = (rest[:, channel] / step).round().clamp(low, high)
        error = (rest[:, channel] - codes * step) / upper[channel, channel]
        rest[:, channel + 1 :] -= error.unsqueeze(1) * upper[channel, channel + 1 :]
    result = torch.empty_like(rest)
    result[:, order] = rest / step.unsqueeze(-1)
    return result.float()
