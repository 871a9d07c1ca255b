"""Range search: the truncation that minimises the squared error (PTQ4VM section 4.3, stage 2).

Every candidate is scored as the pair (scale, zero point) that would be stored, the full range included, so the
result is never worse than minimum to maximum. Shapes: x (images, L, D), already smoothed; W (N, D), already smoothed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vm import reference
from ptq4vm.config import Granularity, QuantSpec

FRACTIONS = torch.arange(31, 1, -1) / 32
"""Candidate ends of a range, as fractions of the minimum or the maximum."""

WEIGHT_FRACTIONS = torch.arange(99, 19, -1) / 100
"""Candidate step sizes of a weight, as fractions of the one that reaches max|W|."""

SAMPLES = 8192
"""Values of one token that are scored; of more, evenly spaced images are taken. The full range is that of all."""


def input_qparams(x: Tensor, spec: QuantSpec, granularity: Granularity, search: bool) -> tuple[Tensor, Tensor]:
    """Static scale and zero point of x: (L,) per token, (1,) per tensor."""
    per_token = granularity is Granularity.PER_TOKEN
    low, high = x.amin((0, 2)), x.amax((0, 2))
    if not per_token:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    if not search:
        return reference.affine_qparams(low, high, spec.bits)
    images = x[:: max(1, x.shape[0] * x.shape[2] // SAMPLES)]
    values = images.transpose(0, 1).flatten(1) if per_token else images.reshape(1, -1)
    return _search_affine(values, low, high, spec.bits)


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


def weight_scale(weight: Tensor, spec: QuantSpec, search: bool) -> Tensor:
    """Step size (N,) of each output channel."""
    full = (weight.abs().amax(-1) / spec.bounds[1]).clamp(min=reference.EPSILON)
    best, best_error = full.clone(), _weight_error(weight, full, spec.bits)
    for fraction in WEIGHT_FRACTIONS.tolist() if search else ():
        scale = (full * fraction).clamp(min=reference.EPSILON)
        error = _weight_error(weight, scale, spec.bits)
        better = error < best_error
        best[better], best_error[better] = scale[better], error[better]
    return best


def _weight_error(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    codes = reference.quantize_weight(weight, scale, bits)
    return (codes * scale.unsqueeze(-1) - weight).square().sum(-1)
