"""x (images, L, D), W (N, D)."""

import pytest
import torch
from helpers.strategies import bits, normal, positive_sizes, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm.ops import quantization
from ptq4vm.quantization_specs import Granularity, IntegerRange, RangeSearch
from ptq4vm.quantizers.range_search import input_qparams, weight_scale

MINMAX, SEARCH = RangeSearch.MINMAX, RangeSearch.SQUARED_ERROR
STATIC = [Granularity.PER_TOKEN, Granularity.PER_TENSOR]


def affine(count: int) -> IntegerRange:
    return IntegerRange(bits=count, narrow_range=False)


def symmetric(count: int) -> IntegerRange:
    return IntegerRange(bits=count, narrow_range=True)


def input_error(x, qparams, count: int) -> torch.Tensor:
    """Squared error of each token, or of everything, with the pair as it is stored."""
    scale, zero_point = qparams
    codes = quantization.quantize(x, 1 / scale, zero_point, None, count)
    error = (quantization.dequantize(codes, scale, zero_point) - x).double().square().sum((0, 2))
    return error if len(scale) > 1 else error.sum()


def weight_error(weight, scale, count: int) -> torch.Tensor:
    codes = quantization.quantize_weight(weight, scale, count)
    return (codes * scale.unsqueeze(-1) - weight).double().square().sum(-1)


def silu_like(*shape: int, seed: int = 0) -> torch.Tensor:
    """x · sigmoid(x) of normals, one value in a hundred ten times as large: the input of Vim's x_proj."""
    x = normal(*shape, seed=seed)
    x = torch.where(normal(*shape, seed=seed + 1) > 2.3, 10 * x, x)
    return x * torch.sigmoid(x)


KINDS = {
    "normal": lambda *shape, seed: normal(*shape, seed=seed),
    "silu": silu_like,
    "positive": lambda *shape, seed: normal(*shape, seed=seed).abs() + 3,
    "negative": lambda *shape, seed: -normal(*shape, seed=seed).exp(),
    "tiny": lambda *shape, seed: normal(*shape, seed=seed) * 1e-30,
    "zero": lambda *shape, seed: torch.zeros(shape),
}
NOT_WORSE = 1 + 1e-6  # the search adds its squares in float32


@given(
    st.sampled_from(sorted(KINDS)), st.sampled_from(STATIC), bits, positive_sizes, positive_sizes, positive_sizes, seeds
)
def test_the_search_is_never_worse_than_minimum_to_maximum(kind, granularity, count, images, tokens, channels, seed):
    x = KINDS[kind](images, tokens, channels, seed=seed)
    full = input_qparams(x, affine(count), granularity, MINMAX)
    found = input_qparams(x, affine(count), granularity, SEARCH)
    assert (input_error(x, found, count) <= NOT_WORSE * input_error(x, full, count)).all()


@given(st.sampled_from(sorted(KINDS)), bits, positive_sizes, positive_sizes, seeds)
def test_the_weights_search_is_never_worse_either(kind, count, outputs, channels, seed):
    weight = KINDS[kind](outputs, channels, seed=seed)
    full, found = (weight_scale(weight, symmetric(count), search) for search in (MINMAX, SEARCH))
    assert (weight_error(weight, found, count) <= NOT_WORSE * weight_error(weight, full, count)).all()


@pytest.mark.parametrize("granularity", STATIC)
def test_a_long_tail_is_cut_at_four_bits(granularity):
    x = silu_like(64, 5, 128)
    full = input_error(x, input_qparams(x, affine(4), granularity, MINMAX), 4)
    found = input_error(x, input_qparams(x, affine(4), granularity, SEARCH), 4)
    assert (found < 0.8 * full).all()


def test_a_weights_outlier_is_cut_at_four_bits():
    weight = silu_like(5, 4096)
    full, found = (weight_error(weight, weight_scale(weight, symmetric(4), search), 4) for search in (MINMAX, SEARCH))
    assert (found < 0.8 * full).all()


@given(bits, st.sampled_from(STATIC), seeds, st.sampled_from(RangeSearch))
def test_qparams_have_the_shape_of_their_granularity_and_are_finite(count, granularity, seed, search):
    x = silu_like(3, 5, 7, seed=seed)
    scale, zero_point = input_qparams(x, affine(count), granularity, search)
    assert scale.shape == zero_point.shape == ((5,) if granularity is Granularity.PER_TOKEN else (1,))
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert torch.isfinite(1 / scale).all() and (scale > 0).all()


@given(bits, seeds)
def test_without_a_search_the_range_is_minimum_to_maximum(count, seed):
    x = normal(3, 5, 7, seed=seed)
    found = input_qparams(x, affine(count), Granularity.PER_TOKEN, MINMAX)
    want = quantization.affine_qparams(x.amin((0, 2)), x.amax((0, 2)), count)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    weight = normal(5, 7, seed=seed)
    largest = quantization.quantize_weight(weight, weight_scale(weight, symmetric(count), MINMAX), count)
    assert (largest.abs().amax(-1) == 2 ** (count - 1) - 1).all()


@settings(max_examples=20)
@given(st.sampled_from(STATIC), bits, seeds, st.sampled_from((MINMAX, SEARCH)), st.integers(-8, 8))
def test_a_power_of_two_goes_through_the_search(granularity, count, seed, search, exponent):
    x, factor = silu_like(3, 5, 7, seed=seed), 2.0**exponent
    scale, zero_point = input_qparams(x, affine(count), granularity, search)
    scaled = input_qparams(x * factor, affine(count), granularity, search)
    assert torch.equal(scaled[0], scale * factor) and torch.equal(scaled[1], zero_point)
    weight = x[0]
    found = weight_scale(weight, symmetric(count), search)
    assert torch.equal(weight_scale(weight * factor, symmetric(count), search), found * factor)


@pytest.mark.parametrize("side", [-1, 1])
def test_an_end_is_cut_by_itself(side):
    """Both ends hold values, one of them also a stray one, which alone is given up."""
    x = side * torch.cat([torch.linspace(-1, 1, 40_000), torch.tensor([3.0])]).view(1, 1, -1)
    scale, zero_point = (value.item() for value in input_qparams(x, affine(4), Granularity.PER_TOKEN, SEARCH))
    low, high = sorted(side * (code - zero_point) * scale for code in (-8, 7))
    assert low == pytest.approx(-1, abs=0.15) and high == pytest.approx(1, abs=0.15)


@given(bits, seeds)
def test_what_is_looked_up_at_once_does_not_matter(count, seed):
    x = silu_like(4, 5, 9, seed=seed)
    whole = input_qparams(x, affine(count), Granularity.PER_TOKEN, SEARCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ptq4vm.quantizers.range_search.LOOKED_UP", 1)
        pieces = input_qparams(x, affine(count), Granularity.PER_TOKEN, SEARCH)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


@settings(max_examples=10)
@given(seeds)
def test_tokens_are_searched_one_by_one(seed):
    x = silu_like(4, 5, 9, seed=seed)
    together = input_qparams(x, affine(4), Granularity.PER_TOKEN, SEARCH)
    alone = [input_qparams(x[:, t : t + 1], affine(4), Granularity.PER_TOKEN, SEARCH) for t in range(5)]
    for i in (0, 1):
        assert torch.equal(together[i], torch.cat([pair[i] for pair in alone]))


def test_thinned_out_samples_still_see_the_whole_range(monkeypatch):
    """More values than are scored: the ends of the range are those of all of them."""
    monkeypatch.setattr("ptq4vm.quantizers.range_search.SAMPLES", 64)
    x = normal(40, 3, 17).clamp(-1, 1)
    x[7, :, 5], x[11, :, 3] = 8, -8
    for granularity in STATIC:
        full = input_qparams(x, affine(8), granularity, MINMAX)
        found = input_qparams(x, affine(8), granularity, SEARCH)
        assert (found[0] <= full[0]).all() and found[0].shape == full[0].shape


@pytest.mark.parametrize("count", [4, 6, 8])
def test_the_released_search_is_worse_and_at_eight_bits_worse_than_none(count):
    """As measured on the released code: it can widen a range beyond what it scored, and never keeps the full one."""
    x = silu_like(64, 5, 128)
    full, found, released = (
        input_error(x, input_qparams(x, affine(count), Granularity.PER_TOKEN, search), count)
        for search in (MINMAX, SEARCH, RangeSearch.RELEASED)
    )
    assert (found < released).all()
    assert (released > full).all() or count < 8


def test_the_released_search_sums_the_power_two_and_four_tenths():
    weight = silu_like(5, 400)
    full = weight.abs().amax(-1, keepdim=True) / 7
    scales = full * torch.arange(100, 19, -1) / 100
    codes = (weight.unsqueeze(-1) / scales.unsqueeze(1)).round().clamp(-7, 7)
    errors = (codes * scales.unsqueeze(1) - weight.unsqueeze(-1)).abs().pow(2.4).sum(1)
    want = scales.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
    assert torch.allclose(weight_scale(weight, symmetric(4), RangeSearch.RELEASED), want, rtol=1e-6)
    assert not torch.allclose(weight_scale(weight, symmetric(4), SEARCH), want, rtol=1e-6)


@given(bits, seeds)
def test_zero_points_are_rounded_to_nearest(count, seed):
    """The low end's code is the lowest one, but for half a step."""
    x = silu_like(3, 5, 64, seed=seed)
    scale, zero_point = input_qparams(x, affine(count), Granularity.PER_TOKEN, MINMAX)
    exact = affine(count).bounds[0] - x.amin((0, 2)).clamp(max=0) / scale
    assert ((zero_point - exact).abs() <= 0.5 + 1e-3).all()


@given(bits, seeds)
def test_the_released_search_finds_one_of_its_hundred_ranges_with_the_nearest_zero_point(count, seed):
    x, (first, last) = silu_like(3, 5, 64, seed=seed), affine(count).bounds
    low, high = x.amin((0, 2)).unsqueeze(1), x.amax((0, 2)).unsqueeze(1)
    alphas = torch.arange(1, 101) / 100
    lows, highs = torch.lerp(low, high, alphas).clamp(max=0), torch.lerp(high, low, alphas).clamp(min=0)
    scales = (highs - lows) / (last - first)
    zeros = (first - lows / scales.clamp(min=1e-8)).round()
    scale, zero_point = input_qparams(x, affine(count), Granularity.PER_TOKEN, RangeSearch.RELEASED)
    near = torch.isclose(scales, scale.unsqueeze(1), rtol=1e-5) & (zeros == zero_point.unsqueeze(1))
    assert near.any(1).all()
