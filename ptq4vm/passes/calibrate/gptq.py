"""Rounding that knows the inputs: GPTQ (Frantar et al. 2023) on the activations that the integer model has.

Shapes: x, x̂ (rows, D) the input in floating point and as the quantized model sees it, both divided by s; W (N, D)
times s.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ptq4vm.quantization_specs import IntegerRange

DAMPING = 0.1
"""Added to the diagonal of x̂ᵀx̂ when codes are chosen, as a share of its mean."""

MORE, TRIES = 10.0, 6
"""The factor by which damping grows where a factorization fails, and how often it does."""

RIDGES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Ridges to choose from when the weight is compensated."""


class Moments:
    """The sums x̂ᵀx̂ and xᵀx̂ over all rows, (2, D, D) in float64: for every other pair of images, and for those between.

    A pair, since an image may be followed by its mirror image, which is no stranger to it.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.own = torch.zeros(2, channels, channels, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.own)

    def add(self, x: Tensor, seen: Tensor) -> None:
        """Adds x and x̂ (images, L, D) of the same images."""
        second = torch.arange(len(x), device=x.device) // 2 % 2 == 1
        for half, chosen in enumerate((~second, second)):
            exact, quantized = (value[chosen].flatten(0, -2).float() for value in (x, seen))
            self.own[half] += (quantized.t() @ quantized).double()
            self.cross[half] += (exact.t() @ quantized).double()


def best_ridge(weight: Tensor, moments: Moments) -> float:
    """Returns that of `RIDGES` whose compensation, found on one half of the images, is best on the other half.

    Late blocks have hardly more tokens in 256 images than channels, and would learn the images by heart. Raises
    ValueError for moments that are not finite.
    """
    if not (torch.isfinite(moments.own).all() and torch.isfinite(moments.cross).all()):
        raise ValueError("products of its inputs are not finite")
    weight = weight.double()
    errors = weight.new_zeros(len(RIDGES))
    for known, other in ((0, 1), (1, 0)):
        own, cross = moments.own[known], moments.cross[known]
        values, vectors = torch.linalg.eigh(own)
        change = weight @ (cross - own) @ vectors
        for index, share in enumerate(RIDGES):
            better = weight + change / (values + _addend(own, share)) @ vectors.t()
            # ‖x̂ W'ᵀ - x Wᵀ‖² without ‖x Wᵀ‖²
            errors[index] += ((better @ moments.own[other] - 2 * weight @ moments.cross[other]) * better).sum()
    return RIDGES[int(errors.argmin())]


def _addend(own: Tensor, share: float) -> Tensor:
    return (share * own.diagonal().mean()).clamp(min=1e-12)


def _damped(own: Tensor, share: float) -> Tensor:
    return own + _addend(own, share) * torch.eye(len(own), dtype=own.dtype, device=own.device)


def compensated_weight(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    """Returns the W' whose products with x̂ come nearest to W's with x: W + W (xᵀx̂ - x̂ᵀx̂) (x̂ᵀx̂ + ridge)⁻¹, (N, D)."""
    own, cross = moments.own.sum(0), moments.cross.sum(0)
    change = _more_damped(lambda share: torch.linalg.solve(_damped(own, share), (cross - own).t()), ridge)
    return (weight.double() + weight.double() @ change.t()).float()


def _more_damped(solve: Callable[[float], Tensor], share: float) -> Tensor:
    """Returns what `solve` does for a share of damping, or for the next larger one for which that is finite."""
    for _ in range(TRIES):
        with contextlib.suppress(torch.linalg.LinAlgError):
            if torch.isfinite(found := solve(share)).all():
                return found
        share *= MORE
    raise ValueError(f"x̂ᵀx̂ has no inverse in float64, even with {share / MORE:g} times its mean on the diagonal")


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Returns the upper U (D, D) with UᵀU the inverse."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def gptq_codes(weight: Tensor, scale: Tensor, spec: IntegerRange, moments: Moments) -> Tensor:
    """Returns int8 codes (N, D) of W: one channel after another, its rounding error moved onto those that follow.

    Channels with the largest inputs come first (GPTQ section 3.3 and its "act order"). Raises ValueError where no
    damping makes x̂ᵀx̂ invertible, or where W is not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the compensated weight is not finite")
    own = moments.own.sum(0)
    order = own.diagonal().argsort(descending=True, stable=True)
    upper = _more_damped(lambda share: _inverse_factor(_damped(own, share)[order][:, order]), DAMPING)
    rest = weight.double()[:, order]
    scale, (low, high) = scale.double(), spec.bounds
    codes = torch.empty_like(rest, dtype=torch.int8)
    for channel, place in enumerate(order.tolist()):
        chosen = (rest[:, channel] / scale).round().clamp(low, high)
        codes[:, place] = chosen.to(torch.int8)
        error = (rest[:, channel] - chosen * scale) / upper[channel, channel]
        rest[:, channel + 1 :] -= error.unsqueeze(1) * upper[channel, channel + 1 :]
    return codes
