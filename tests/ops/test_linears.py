"""Laws of integer linears and of packed weights."""

import torch
from helpers.strategies import integers, layouts, normal, powers_of_two, seeds, sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq4vm.ops import layouts as weight_layouts
from ptq4vm.ops import linears


def exact(x_q: Tensor, x_zero_point: Tensor, w_q: Tensor) -> Tensor:
    return (x_q.long() - x_zero_point.long().unsqueeze(-1)) @ w_q.long().t()


@settings(max_examples=100)
@given(
    st.integers(0, 3000) | st.sampled_from([1023, 1024, 1025, 2048, 2049]),
    sizes,
    sizes,
    st.sampled_from([(-128, 127), (-128, -128), (127, 127), (-8, 7)]),
    layouts,
    seeds,
)
def test_accumulators_are_exact(channels, tokens, outputs, extremes, layout, seed):
    x_q = layout(integers(*extremes, 2, tokens, channels, seed=seed))
    w_q = layout(integers(*extremes, outputs, channels, seed=seed + 1))
    zero_point = integers(*extremes, tokens, seed=seed + 2).int()
    acc = linears.accumulate(x_q, zero_point, w_q)
    assert acc.dtype == torch.int32
    assert torch.equal(acc.long(), exact(x_q, zero_point, w_q))


def test_the_largest_accumulator_is_exact():
    channels = 65000
    x_q = torch.full((1, 1, channels), 127, dtype=torch.int8)
    zero_point, w_q = torch.tensor([-128], dtype=torch.int32), torch.full((1, channels), 127, dtype=torch.int8)
    assert linears.accumulate(x_q, zero_point, w_q).item() == channels * 255 * 127


@given(sizes, sizes, seeds, st.booleans())
def test_rescaling_by_powers_of_two_is_exact(tokens, outputs, seed, has_bias):
    acc = torch.randint(-(2**20), 2**20, (2, tokens, outputs), generator=torch.Generator().manual_seed(seed)).int()
    x_scale = powers_of_two(tokens, seed=seed, low=-4, high=4)
    w_scale = powers_of_two(outputs, seed=seed + 1, low=-4, high=4)
    bias = integers(-8, 7, outputs, seed=seed).float() if has_bias else None
    want = acc.double() * x_scale.double().unsqueeze(-1) * w_scale.double() + (0 if bias is None else bias.double())
    got = linears.rescale(acc, x_scale, w_scale, bias, torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), want.float().double())


@given(sizes, st.integers(0, 40), sizes, seeds, layouts)
def test_a_packed_weight_gives_the_same(tokens, channels, outputs, seed, layout):
    x_q, w_q = integers(-8, 7, 2, tokens, channels, seed=seed), integers(-7, 7, outputs, channels, seed=seed + 1)
    x_scale, zero_point = normal(tokens, seed=seed).exp(), integers(-8, 7, tokens, seed=seed).int()
    rest = (normal(outputs, seed=seed).exp(), normal(outputs, seed=seed + 1), torch.float32)
    plain = linears.linear(x_q, x_scale, zero_point, w_q, *rest)
    packed = linears.linear(layout(x_q), x_scale, zero_point, layout(weight_layouts.pack_int4(w_q)), *rest)
    assert plain.shape == (2, tokens, outputs)
    assert torch.equal(plain, packed)


@given(sizes, st.integers(0, 40), seeds, layouts)
def test_unpack_is_the_inverse_of_pack(rows, channels, seed, layout):
    codes = integers(-8, 7, rows, channels, seed=seed)
    packed = weight_layouts.pack_int4(layout(codes))
    assert packed.dtype == torch.uint8 and packed.shape == (rows, (channels + 1) // 2)
    unpacked = weight_layouts.unpack_int4(layout(packed), channels)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)


def test_the_low_nibble_comes_first_and_the_last_may_be_empty():
    packed = weight_layouts.pack_int4(torch.tensor([[1, -1, 7, -8, 3]], dtype=torch.int8))
    assert packed.tolist() == [[0xF1, 0x87, 0x03]]
