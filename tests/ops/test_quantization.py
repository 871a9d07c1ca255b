"""Laws of codes, scales and zero points."""

import math

import torch
from helpers.strategies import bits, integers, layouts, normal, positive_sizes, powers_of_two, seeds, sizes
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.ops import quantization
from ptq4vm.quantization_specs import IntegerRange
from ptq4vm.quantizers import quantized_decomposed as qd


def bounds(count: int, narrow_range: bool = False) -> tuple[int, int]:
    return IntegerRange(bits=count, narrow_range=narrow_range).bounds


@given(bits, sizes, sizes, sizes, layouts, seeds)
def test_codes_survive_a_round_trip(count, images, tokens, channels, layout, seed):
    low, high = bounds(count)
    codes = integers(low, high, images, tokens, channels, seed=seed)
    scale, zero_point = normal(tokens, seed=seed).exp(), integers(low, high, tokens, seed=seed + 1).int()
    x = layout(quantization.dequantize(codes, scale, zero_point))
    assert torch.equal(quantization.quantize(x, 1 / scale, zero_point, None, count), codes)


@given(bits, positive_sizes, positive_sizes, layouts, seeds, st.booleans())
def test_codes_are_those_of_torch(count, tokens, channels, layout, seed, ties):
    low, high = bounds(count)
    scale = powers_of_two(tokens, seed=seed) if ties else normal(tokens, seed=seed).exp()
    zero_point = integers(low, high, tokens, seed=seed + 1).int()
    if ties:
        x = (integers(-120, 120, 2, tokens, channels, seed=seed + 2).float() + 0.5) * scale.view(-1, 1)
    else:
        x = 2 ** (count - 2) * normal(2, tokens, channels, seed=seed + 2) * scale.view(-1, 1)
    theirs = qd.quantize_per_channel(x, scale, zero_point, 1, low, high, torch.int8)
    ours = quantization.quantize(layout(x), 1 / scale, zero_point, None, count)
    assert torch.equal(ours, theirs)
    back = qd.dequantize_per_channel(theirs, scale, zero_point, 1, low, high, torch.int8)
    assert torch.equal(quantization.dequantize(ours, scale, zero_point), back)


def test_ties_round_to_even():
    x = torch.tensor([[[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]]])
    codes = quantization.quantize(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, 8)
    assert codes.tolist() == [[[-2, -2, 0, 0, 2, 2]]]


@given(bits, seeds)
def test_what_lies_outside_is_clamped_after_the_shift(count, seed):
    low, high = bounds(count)
    zero_point = integers(low, high, 1, seed=seed).int()
    x = torch.tensor([[[-1e6, 0.0, 1e6]]])
    codes = quantization.quantize(x, torch.ones(1), zero_point, None, count)
    assert codes.tolist() == [[[low, zero_point.item(), high]]]


@given(bits, seeds)
def test_smoothing_is_a_multiplication_before(count, seed):
    x, inv_smooth = normal(2, 5, 7, seed=seed), normal(7, seed=seed + 1).exp()
    inv_scale, zero_point = normal(5, seed=seed + 2).exp(), integers(*bounds(count), 5, seed=seed).int()
    smoothed = quantization.quantize(x * inv_smooth, inv_scale, zero_point, None, count)
    assert torch.equal(quantization.quantize(x, inv_scale, zero_point, inv_smooth, count), smoothed)


@given(bits, seeds)
def test_qparams_per_tensor_token_and_image_broadcast(count, seed):
    x, zero = normal(2, 3, 4, seed=seed), torch.ones(1, dtype=torch.int32)
    one = quantization.quantize(x, torch.full((1,), 3.0), zero, None, count)
    for shape in ((3,), (2, 3)):
        scale = torch.full(shape, 3.0)
        assert torch.equal(quantization.quantize(x, scale, zero.expand(shape), None, count), one)


@given(bits, seeds)
def test_weight_codes_survive_a_round_trip_and_never_reach_the_lowest(count, seed):
    low, high = bounds(count, narrow_range=True)
    codes, scale = integers(low, high, 6, 9, seed=seed), normal(6, seed=seed).exp()
    assert torch.equal(quantization.quantize_weight(codes * scale.view(-1, 1), scale, count), codes)
    beyond = quantization.quantize_weight(torch.full((6, 1), -1e30), scale, count)
    assert (beyond == low).all() and low == -high


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(bits, finite, finite)
def test_zero_is_a_code_and_every_zero_point_too(count, low, high):
    scale, zero_point = quantization.affine_qparams(torch.tensor([low]), torch.tensor([high]), count)
    assert bounds(count)[0] <= zero_point.item() <= bounds(count)[1]
    assert scale.item() > 0 and math.isfinite(1 / scale.item())
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    code = quantization.quantize(torch.zeros(1, 1, 1), 1 / scale, zero_point, None, count)
    assert code.item() == zero_point.item()
    assert quantization.dequantize(code, scale, zero_point).item() == 0


@given(bits, st.integers(-6, 6), seeds)
def test_a_range_of_codes_is_found_again(count, exponent, seed):
    low, high = bounds(count)
    zero_point = integers(low, high, 7, seed=seed).int()
    scale = torch.full((7,), 2.0**exponent)
    found = quantization.affine_qparams((low - zero_point) * scale, (high - zero_point) * scale, count)
    assert torch.equal(found[0], scale) and torch.equal(found[1], zero_point)


@given(bits, st.floats(-100, 100, width=32), st.floats(-100, 100, width=32))
def test_nothing_between_the_ends_and_zero_is_off_by_more_than_half_a_step(count, one, other):
    ends = torch.tensor([one, other, 0.0])
    scale, zero_point = quantization.affine_qparams(min(ends[:2]).view(1), max(ends[:2]).view(1), count)
    x = torch.linspace(ends.min(), ends.max(), 101).view(1, 1, -1)
    back = quantization.dequantize(quantization.quantize(x, 1 / scale, zero_point, None, count), scale, zero_point)
    assert (back - x).abs().max() <= scale.item() / 2 + 1e-6 * ends.abs().max()


def test_zeros_have_qparams():
    scale, zero_point = quantization.affine_qparams(torch.zeros(2), torch.zeros(2), 4)
    assert torch.isfinite(1 / scale).all() and zero_point.tolist() == [-8, -8]


@given(bits, positive_sizes, positive_sizes, seeds, st.booleans())
def test_dynamic_qparams_are_those_of_each_tokens_range(count, tokens, channels, seed, smooth):
    x = normal(2, tokens, channels, seed=seed)
    inv_smooth = powers_of_two(channels, seed=seed) if smooth else None
    v = x * inv_smooth if smooth else x
    want = quantization.affine_qparams(v.amin(-1), v.amax(-1), count)
    found = quantization.choose_qparams(x, inv_smooth, count)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert found[0].shape == (2, tokens)
