"""Range search: the truncation that minimises the squared error (PTQ4VM section 4.3, stage 2).

Every candidate is scored as the pair (scale, zero point) that would be stored, the full range included, so the
result is never worse than minimum to maximum. `RangeSearch.RELEASED` is what PTQ4VM's released code does instead, for
comparison. Shapes: x (images, L, D), already smoothed; W (N, D), already smoothed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vm import reference
from ptq4vm.config import Granularity, QuantSpec, RangeSearch

FRACTIONS = torch.arange(31, 1, -1) / 32
"""Candidate ends of a range, as fractions of the minimum or the maximum."""

WEIGHT_FRACTIONS = torch.arange(99, 19, -1) / 100
"""Candidate step sizes of a weight, as fractions of the one that reaches max|W|."""

RELEASED_CANDIDATES, RELEASED_POWER = 100, 2.4
"""Of the released code: its number of candidates, and the power of the error that it sums."""

SAMPLES = 8192
"""Values of one token that are scored; of more, evenly spaced images are taken. The full range is that of all."""


def input_qparams(x: Tensor, spec: QuantSpec, granularity: Granularity, search: RangeSearch) -> tuple[Tensor, Tensor]:
    """Static scale and zero point of x: (L,) per token, (1,) per tensor."""
    per_token = granularity is Granularity.PER_TOKEN
    low, high = x.amin((0, 2)), x.amax((0, 2))
    if not per_token:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    if search is RangeSearch.MINMAX:
        return reference.affine_qparams(low, high, spec.bits)
    images = x[:: max(1, x.shape[0] * x.shape[2] // SAMPLES)]
    values = images.transpose(0, 1).flatten(1) if per_token else images.reshape(1, -1)
    find = _released_affine if search is RangeSearch.RELEASED else _search_affine
    return find(values, low, high, spec.bits)


def _search_affine(values: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Shrinks both ends together, then each by itself, twice; every row of `values` keeps its own best."""
    best_low, best_high = low.clone(), high.clone()
    best = _affine_error(values, low, high, bits)

    def offer(candidate_low: Tensor, candidate_high: Tensor) -> None:
        error = _affine_error(values, candidate_low, candidate_high, bits)
        better = error < best
        best[better] = error[better]
        best_low[better], best_high[better] = candidate_low[better], candidate_high[better]

    for fraction in FRACTIONS.tolist():
        offer(low * fraction, high * fraction)
    for _ in range(2):
        for fraction in FRACTIONS.tolist():
            offer(best_low.clone(), high * fraction)
        for fraction in FRACTIONS.tolist():
            offer(low * fraction, best_high.clone())
    return reference.affine_qparams(best_low, best_high, bits)


def _affine_error(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Squared error of each row, as it would be stored."""
    scale, zero_point = reference.affine_qparams(low, high, bits)
    codes = reference.quantize(values, 1.0 / scale, zero_point, None, bits)
    return (reference.dequantize(codes, scale, zero_point) - values).square_().sum(-1)


def _released_affine(values: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Both ends move past each other through the centre, so the full range is never tried and half of the candidates
    are inverted; the best of them is then widened until it holds zero, which nothing has scored."""
    best_low, best_high, best = low.clone(), high.clone(), torch.full_like(low, 1e10)
    levels, center = 2**bits - 1, 2 ** (bits - 1)
    for step in range(1, RELEASED_CANDIDATES + 1):
        alpha = step / RELEASED_CANDIDATES
        candidate_low, candidate_high = torch.lerp(low, high, alpha), torch.lerp(high, low, alpha)
        scale = ((candidate_high - candidate_low) / levels).clamp(min=1e-8).unsqueeze(-1)
        zero_point = (-candidate_low.unsqueeze(-1) / scale).round()
        codes = ((values / scale).round() + zero_point).clamp(0, levels)
        error = ((codes - zero_point) * scale - values).abs().pow(RELEASED_POWER).mean(-1)
        better = error < best
        best[better], best_low[better], best_high[better] = error[better], candidate_low[better], candidate_high[better]
    best_low, best_high = best_low.clamp(max=0), best_high.clamp(min=0)
    scale = ((best_high - best_low) / levels).clamp(min=1e-8)
    return scale, (-(best_low / scale).round()).clamp(0, levels).to(torch.int32) - center


def weight_scale(weight: Tensor, spec: QuantSpec, search: RangeSearch) -> Tensor:
    """Step size (N,) of each output channel."""
    full = (weight.abs().amax(-1) / spec.bounds[1]).clamp(min=reference.EPSILON)
    power = RELEASED_POWER if search is RangeSearch.RELEASED else 2.0
    best, best_error = full.clone(), _weight_error(weight, full, spec.bits, power)
    for fraction in WEIGHT_FRACTIONS.tolist() if search is not RangeSearch.MINMAX else ():
        scale = (full * fraction).clamp(min=reference.EPSILON)
        error = _weight_error(weight, scale, spec.bits, power)
        better = error < best_error
        best[better], best_error[better] = scale[better], error[better]
    return best


def _weight_error(weight: Tensor, scale: Tensor, bits: int, power: float) -> Tensor:
    codes = reference.quantize_weight(weight, scale, bits)
    return (codes * scale.unsqueeze(-1) - weight).abs().pow(power).sum(-1)
