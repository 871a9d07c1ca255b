"""Range searches against what they are defined to be: every candidate tried by quantizing, in plain loops.

Shapes: values (rows, n); a pair is (scale, zero_point). Values are in quarters, so squares of errors sum exactly where
scales are powers of two.
"""

import pytest
import torch
from helpers.strategies import integers, normal, powers_of_two, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq4vm.ops import quantization
from ptq4vm.quantization_specs import Granularity, IntegerRange, RangeSearch
from ptq4vm.quantizers import range_search
from ptq4vm.quantizers.clusters import Statistics, least_error, symmetric_scale
from ptq4vm.quantizers.range_search import input_qparams, weight_scale

widths = st.integers(2, 5)
ENDS = [i / 32 for i in range(32, 1, -1)]
STEPS = [i / 100 for i in range(100, 19, -1)]
SYMMETRIC_STEPS = [i / 100 for i in range(100, 9, -2)]


def affine(count: int) -> IntegerRange:
    return IntegerRange(bits=count, narrow_range=False)


def error(values: Tensor, scale: Tensor, zero_point: Tensor, count: int) -> float:
    """Σ (x_q - x)² of one row, float64."""
    codes = quantization.quantize(values[None], 1 / scale.view(1), zero_point.view(1), None, count)
    return float((quantization.dequantize(codes, scale.view(1), zero_point.view(1)) - values).double().square().sum())


@given(widths, seeds)
def test_running_sums_are_the_squared_errors(count, seed):
    """Several rows, each with candidates of its own."""
    values = integers(-60, 60, 3, 11, seed=seed).float() / 4
    scale = powers_of_two(3, 4, seed=seed, low=-2, high=2)
    zero_point = integers(-(2 ** (count - 1)), 2 ** (count - 1) - 1, 3, 4, seed=seed + 1).int()
    found = range_search._SquaredError(values, affine(count))(scale, zero_point)
    want = [
        [error(values[r], scale[r, c], zero_point[r, c], count) for c in range(scale.shape[1])]
        for r in range(len(values))
    ]
    assert torch.equal(found, torch.tensor(want, dtype=torch.float64))


def best_ends(values: Tensor, ends: list[tuple[float, float]], count: int) -> tuple[float, float]:
    """The first of the ends with the least error."""
    low, high = (torch.tensor(side) for side in zip(*ends, strict=True))
    scale, zero_point = quantization.affine_qparams(low, high, count)
    errors = [error(values, scale[i], zero_point[i], count) for i in range(len(ends))]
    return ends[errors.index(min(errors))]


def searched(values: Tensor, low: float, high: float, count: int) -> float:
    """The error after both ends were shrunk together, then each by itself, twice."""
    lows, highs = [low * end for end in ENDS], [high * end for end in ENDS]
    a, b = best_ends(values, list(zip(lows, highs, strict=True)), count)
    for _ in range(2):
        a, b = best_ends(values, [(a, other) for other in highs], count)
        a, b = best_ends(values, [(other, b) for other in lows], count)
    return error(values, *quantization.affine_qparams(torch.tensor(a), torch.tensor(b), count), count)


@settings(max_examples=6)
@given(widths, st.sampled_from([Granularity.PER_TOKEN, Granularity.PER_TENSOR]), seeds)
def test_the_search_is_the_descent_over_both_ends(count, granularity, seed):
    """Candidates whose errors differ by rounding alone may change places, so errors are compared."""
    x = normal(4, 2, 9, seed=seed) ** 3
    scale, zero_point = input_qparams(x, affine(count), granularity, RangeSearch.SQUARED_ERROR)
    rows = x.transpose(0, 1).flatten(1) if granularity is Granularity.PER_TOKEN else x.reshape(1, -1)
    assert len(scale) == len(rows)
    for row, *pair in zip(rows, scale, zero_point, strict=True):
        want = searched(row, row.min().item(), row.max().item(), count)
        assert error(row, *pair, count) == pytest.approx(want, rel=1e-4)


def released(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The released code's search for one row: 100 ends between minimum and maximum, errors to the power of 2.4."""
    low, high, levels = values.min(), values.max(), 2**count - 1
    best, best_low, best_high = torch.tensor(1e10), low, high
    for step in range(1, 101):
        a, b = torch.lerp(low, high, step / 100), torch.lerp(high, low, step / 100)
        scale = torch.clamp((b - a) / levels, min=1e-8)
        zero = torch.round(-a / scale)
        fake = (torch.clamp(torch.round(values / scale) + zero, 0, levels) - zero) * scale
        loss = (fake - values).abs().pow(2.4).mean()
        if loss < best:
            best, best_low, best_high = loss, a, b
    best_low, best_high = min(best_low, torch.tensor(0.0)), max(best_high, torch.tensor(0.0))
    scale = torch.clamp((best_high - best_low) / levels, min=1e-8)
    return scale, torch.clamp(-torch.round(best_low / scale), 0, levels).int() - 2 ** (count - 1)


KINDS = {
    "both": lambda x: x,
    "positive": lambda x: x.abs() + 1,
    "negative": lambda x: -x.abs() - 1,
    "none": torch.zeros_like,
}


@settings(max_examples=10)
@given(st.sampled_from(sorted(KINDS)), widths, st.integers(0, 2**20))
def test_the_released_search_is_the_released_codes(kind, count, seed):
    x = KINDS[kind](normal(3, 2, 8, seed=seed))
    found = input_qparams(x, affine(count), Granularity.PER_TOKEN, RangeSearch.RELEASED)
    want = [released(row, count) for row in x.transpose(0, 1).flatten(1)]
    for have, expected in zip(found, zip(*want, strict=True), strict=True):
        assert torch.equal(have, torch.stack(expected))


@settings(max_examples=10)
@given(widths, st.sampled_from([(RangeSearch.SQUARED_ERROR, 2.0), (RangeSearch.RELEASED, 2.4)]), seeds)
def test_a_weights_step_is_the_best_of_81_fractions(count, way, seed):
    weight, spec = normal(3, 16, seed=seed) ** 3, IntegerRange(bits=count, narrow_range=True)
    found, last = weight_scale(weight, spec, way[0]), 2 ** (count - 1) - 1
    for row, scale in zip(weight, found, strict=True):
        candidates = row.abs().max() / last * torch.tensor(STEPS)
        errors = [((row / s).round().clamp(-last, last) * s - row).abs().pow(way[1]).sum() for s in candidates]
        assert scale == candidates[torch.stack(errors).argmin()]


def test_zeros_have_the_smallest_scale_of_all():
    for way in RangeSearch:
        found = weight_scale(torch.zeros(2, 3), IntegerRange(bits=4, narrow_range=True), way)
        assert torch.equal(found, torch.full((2,), torch.finfo(torch.float32).tiny))


@settings(max_examples=10)
@given(widths, seeds)
def test_a_symmetric_step_is_the_best_of_46_fractions(count, seed):
    values = normal(3, 24, seed=seed) ** 3
    largest = values.abs().amax(1) * 1.5  # of more values than these
    found = symmetric_scale(values, largest, affine(count), RangeSearch.SQUARED_ERROR)
    for row, most, scale in zip(values, largest, found, strict=True):
        candidates = most / (2 ** (count - 1) - 0.5) * torch.tensor(SYMMETRIC_STEPS)
        zero = torch.zeros((), dtype=torch.int32)
        errors = [error(row, candidate, zero, count) for candidate in candidates]
        assert error(row, scale, zero, count) == pytest.approx(min(errors), rel=1e-5)
        assert (scale == candidates).any()


def test_the_first_of_equal_steps_is_taken():
    values, candidates = torch.zeros(2, 5), torch.tensor([[4.0, 2.0], [1.0, 3.0]])
    assert torch.equal(least_error(values, candidates, affine(4)), torch.tensor([4.0, 1.0]))


@settings(max_examples=10)
@given(widths, st.booleans(), seeds)
def test_steps_of_clusters_are_those_of_their_values(count, power_of_two, seed):
    """Three groups of tokens that are far apart; a later step is the first one's times the better power of two."""
    sizes = torch.tensor([1.0, 900.0, 30.0, 1.0, 30.0, 900.0])
    x = normal(4, 6, 5, seed=seed) * sizes.view(-1, 1)
    statistics = Statistics()
    for piece in x.split(3):
        statistics.add(piece, 1)
    found = statistics.clustered_scale(3, affine(count), RangeSearch.MINMAX, power_of_two)
    first = None
    for size in (1.0, 30.0, 900.0):
        values = x.transpose(0, 1)[sizes == size].reshape(1, -1)
        step = values.abs().amax(1) / (2 ** (count - 1) - 0.5)
        if first is None:
            first = step
        elif power_of_two:
            exponent = torch.log2(step / first)
            step = least_error(
                values, torch.stack([first * 2 ** exponent.floor(), first * 2 ** exponent.ceil()], 1), affine(count)
            )
        assert torch.equal(found[sizes == size], step.expand(2))


def test_of_many_values_every_nth_image_is_scored(monkeypatch):
    """12 images of 8 channels and 32 to score: every third image, with the range of all of them."""
    monkeypatch.setattr(range_search, "SAMPLES", 32)
    x = normal(12, 2, 8)
    x[0, :, 0], x[0, :, 1] = -9, 9
    few = x[::3]
    for granularity in (Granularity.PER_TOKEN, Granularity.PER_TENSOR):
        found = input_qparams(x, affine(4), granularity, RangeSearch.SQUARED_ERROR)
        assert all(map(torch.equal, found, input_qparams(few, affine(4), granularity, RangeSearch.SQUARED_ERROR)))
    x[1::3] *= 0.5
    x[2::3] *= 0.25
    again = input_qparams(x, affine(4), granularity, RangeSearch.SQUARED_ERROR)
    assert all(map(torch.equal, found, again))
