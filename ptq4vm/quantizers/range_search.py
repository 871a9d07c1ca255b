"""Range search: the truncation that minimises the squared error (PTQ4VM section 4.3, stage 2).

Every candidate is scored as the pair (scale, zero point) that would be stored, the full range included, so the
result is never worse than minimum to maximum. `RangeSearch.RELEASED` is what PTQ4VM's released code does instead, for
comparison. Shapes: x (images, L, D), already smoothed; W (N, D), already smoothed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.ops import quantization
from ptq4vm.quantization_specs import Granularity, IntegerRange, RangeSearch

FRACTIONS = torch.arange(32, 1, -1) / 32
"""Candidate ends of a range, as fractions of the minimum or the maximum."""

WEIGHT_FRACTIONS = torch.arange(100, 19, -1) / 100
"""Candidate scales of a weight, as fractions of the one that reaches max|W|."""

RELEASED_CANDIDATES, RELEASED_POWER = 100, 2.4
"""The released code's number of candidates, and the power of the error that it sums."""

LOOKED_UP = 2**22
"""Ends of codes looked up at once, which bounds the memory."""

SAMPLES = 8192
"""Values of one token that are scored; of more, evenly spaced images are taken. The full range is that of all."""


def input_qparams(
    x: Tensor, spec: IntegerRange, granularity: Granularity, search: RangeSearch
) -> tuple[Tensor, Tensor]:
    """Returns the static scale and zero point of x: (L,) per token, (1,) per tensor."""
    per_token = granularity is Granularity.PER_TOKEN
    low, high = x.amin((0, 2)), x.amax((0, 2))
    if not per_token:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    if search is RangeSearch.MINMAX:
        return quantization.affine_qparams(low, high, spec.bits)
    images = x[:: max(1, x.shape[0] * x.shape[2] // SAMPLES)]
    values = images.transpose(0, 1).flatten(1) if per_token else images.reshape(1, -1)
    find = _released_affine if search is RangeSearch.RELEASED else _search_affine
    return find(values, low, high, spec)


def _search_affine(values: Tensor, low: Tensor, high: Tensor, spec: IntegerRange) -> tuple[Tensor, Tensor]:
    """Shrinks both ends together, then each by itself, twice; every row of `values` keeps its own best."""
    error = _SquaredError(values, spec)
    lows, highs = low.unsqueeze(-1) * FRACTIONS, high.unsqueeze(-1) * FRACTIONS

    def best(candidate_lows: Tensor, candidate_highs: Tensor) -> tuple[Tensor, Tensor]:
        candidate_lows, candidate_highs = torch.broadcast_tensors(candidate_lows, candidate_highs)
        pairs = quantization.affine_qparams(candidate_lows, candidate_highs, spec.bits)
        found = error(*pairs).argmin(-1, keepdim=True)
        return candidate_lows.gather(-1, found), candidate_highs.gather(-1, found)

    best_low, best_high = best(lows, highs)
    for _ in range(2):
        best_low, best_high = best(best_low, highs)
        best_low, best_high = best(lows, best_high)
    return quantization.affine_qparams(best_low.squeeze(-1), best_high.squeeze(-1), spec.bits)


class _SquaredError:
    """Squared errors of the rows of values (rows, n) with many scales and zero points.

    The values of a row that get one level v lie beside each other when sorted, and their error Σ (x - v)² is
    Σ x² - 2 v Σ x + v² · number: differences of running sums. A pair costs one search a code, whatever n is.
    """

    def __init__(self, values: Tensor, spec: IntegerRange) -> None:
        first, last = spec.bounds
        self.codes = torch.arange(first, last + 1, device=values.device)
        self.sorted = values.float().contiguous().sort(-1).values
        exact = self.sorted.double()
        self.sums, self.squares = (F.pad(value.cumsum(-1), (1, 0)) for value in (exact, exact.square()))

    def __call__(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Returns the errors, float64 (rows, candidates), of scales and zero points of that shape."""
        few = max(1, LOOKED_UP // (len(scale) * len(self.codes)))
        pairs = zip(scale.split(few, -1), zero_point.split(few, -1), strict=True)
        return torch.cat([self._few(*pair) for pair in pairs], -1)

    def _few(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        levels = (self.codes - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)  # (rows, candidates, codes)
        between = (levels[..., 1:] + levels[..., :-1]) / 2
        ends = torch.searchsorted(self.sorted, between.flatten(1)).view(between.shape)
        ends = F.pad(F.pad(ends, (1, 0)), (0, 1), value=self.sorted.shape[-1])
        sums, squares = (
            running.gather(-1, ends.flatten(1)).view(ends.shape).diff(dim=-1) for running in (self.sums, self.squares)
        )
        levels = levels.double()
        return (squares - 2 * levels * sums + levels.square() * ends.diff(dim=-1)).sum(-1)


def _released_affine(values: Tensor, low: Tensor, high: Tensor, spec: IntegerRange) -> tuple[Tensor, Tensor]:
    """Both ends move past each other through the centre, so the full range is never tried and half of the candidates
    are inverted; the best of them is then widened until it holds zero, which nothing has scored."""
    best_low, best_high, best = low.clone(), high.clone(), torch.full_like(low, 1e10)
    levels, center = 2**spec.bits - 1, 2 ** (spec.bits - 1)
    for candidate in range(1, RELEASED_CANDIDATES + 1):
        alpha = candidate / RELEASED_CANDIDATES
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


def weight_scale(weight: Tensor, spec: IntegerRange, search: RangeSearch) -> Tensor:
    """Returns the scale (N,) of each output channel."""
    full = (weight.abs().amax(-1) / spec.bounds[1]).clamp(min=quantization.EPSILON)
    if search is RangeSearch.MINMAX:
        return full
    power = RELEASED_POWER if search is RangeSearch.RELEASED else 2.0
    scales = (full.unsqueeze(-1) * WEIGHT_FRACTIONS).clamp(min=quantization.EPSILON)
    error = torch.stack([_weight_error(weight, scale, spec.bits, power) for scale in scales.unbind(-1)], -1)
    return scales.gather(-1, error.argmin(-1, keepdim=True)).squeeze(-1)


def _weight_error(weight: Tensor, scale: Tensor, bits: int, power: float) -> Tensor:
    codes = quantization.quantize_weight(weight, scale, bits)
    return (codes * scale.unsqueeze(-1) - weight).abs().pow(power).sum(-1)
