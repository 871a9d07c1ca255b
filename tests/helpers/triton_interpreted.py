"""The Triton kernels on CPU tensors, against the references. Runs under TRITON_INTERPRET=1: test_triton.py starts it.

Results start as NaN and 127, so that what a kernel does not write is wrong.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from helpers.draws import (
    KINDS,
    assert_same_codes,
    directional_qparams,
    draw,
    linear_inputs,
    qparams,
    relative,
    rows_of_more,
)
from ptq4vm.backend import triton as triton_kernels
from ptq4vm.ops import convolution_1d, convolution_2d, layouts, linears, norms, quantization
from ptq4vm.ops._define import on_gpus

DRAWN = int(os.environ["PTQ4VM_TEST_EXAMPLES"])
"""Examples of each law beside those that are written here."""

FEW = settings(
    max_examples=max(1, DRAWN),
    phases=(Phase.explicit, Phase.generate) if DRAWN else (Phase.explicit,),
    deadline=None,
    derandomize=True,
    database=None,
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}  # the interpreter truncates to bfloat16
IMAGES, TOKENS = st.integers(0, 2), st.sampled_from([0, 1, 2, 7, 17])
CHANNELS = st.sampled_from([1, 3, 16, 33, 96, 100, 256, 300])
BITS, OPTIONAL, SEEDS = st.integers(2, 8), st.integers(0, 7), st.integers(0, 2**20)


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """torch.empty is full of NaN and of the largest integers."""
    torch._C._set_deterministic_algorithms(True)  # the public function imports Inductor first
    yield
    torch._C._set_deterministic_algorithms(False)


def run(name, *arguments):
    y = triton_kernels.run(name, *arguments)
    assert all(value.is_contiguous() for value in (y if isinstance(y, tuple) else (y,)))
    return y


@FEW
@given(IMAGES, TOKENS, CHANNELS, BITS, KINDS, DTYPES, st.booleans(), SEEDS)
@example(2, 17, 300, 8, "token", torch.float32, True, 0)
@example(2, 17, 33, 4, "image", torch.bfloat16, False, 1)
@example(0, 3, 5, 8, "tensor", torch.float32, True, 2)
@example(1, 1, 1, 8, "token", torch.float16, True, 3)
def test_codes_are_the_references(images, tokens, channels, bits, kind, dtype, smooth, seed):
    random = draw(seed)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    # some values so large that they are clamped, some exactly between two codes
    x = torch.randn(images, tokens, channels, generator=random) * 10 ** (seed % 5)
    x = torch.where(torch.rand(x.shape, generator=random) < 0.3, torch.round(x) + 0.5, x).to(dtype)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    arguments = (x, 1 / scale, zero_point, inv_smooth, bits)
    assert torch.equal(run("quantize", *arguments), quantization.quantize(*arguments))


@pytest.mark.parametrize("bits", [2, 8])
def test_numbers_that_are_not_finite_and_ties_have_the_references_codes(bits):
    inf, largest = torch.inf, torch.finfo(torch.float32).max
    x = torch.tensor([torch.nan, inf, -inf, largest, -largest, 1e-45, -0.0, 127.5, -127.5, 0.5, 1.5, -0.5]).repeat(5, 3)
    zero_point = torch.tensor([0, 1, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))], dtype=torch.int32)
    arguments = (x, torch.ones(5), zero_point, None, bits)
    assert torch.equal(run("quantize", *arguments), quantization.quantize(*arguments))


@FEW
@given(IMAGES, TOKENS, CHANNELS, BITS, KINDS, DTYPES, *[st.booleans()] * 3, OPTIONAL, SEEDS)
@example(2, 5, 192, 8, "token", torch.float32, True, False, True, 7, 0)
@example(2, 7, 100, 8, "token", torch.bfloat16, False, False, True, 7, 1)
@example(1, 2, 33, 4, "image", torch.float16, False, False, False, 0, 2)
@example(1, 2, 12, 8, "token", torch.float32, True, True, True, 7, 3)
@example(0, 2, 8, 8, "tensor", torch.float32, True, False, True, 7, 3)
def test_sums_and_codes_of_norms_are_the_references(
    images, tokens, channels, bits, kind, dtype, rms, rotated, add, optional, seed
):
    random = draw(seed)
    scale, zero_point = qparams(kind, images, tokens, bits, random)

    def numbers(*shape):
        return torch.randn(shape, generator=random)

    x = (numbers(images, tokens, channels) * 10.0 ** (seed % 5 - 2) + seed % 3).to(dtype)
    residual = numbers(images, tokens, channels) * 10.0 ** (seed % 5 - 2) if add else None
    weight = numbers(channels) if optional & 1 else None
    bias = numbers(channels) if optional & 2 and not rms else None
    inv_smooth = torch.rand(channels, generator=random) if optional & 4 else None
    qparams_of = (20 / 2 ** (8 - bits) / scale, zero_point, inv_smooth, bits)
    arguments = (x, residual, weight, bias, 1e-5, rms, rotated, *qparams_of)
    total, codes = run("norm_quantize", *arguments)
    want, want_codes = norms.norm_quantize(*arguments)
    assert torch.equal(total, want) and total.dtype == torch.float32
    assert_same_codes(codes, want_codes)


def test_a_row_too_long_for_registers_takes_the_reference():
    x, one = torch.randn(1, 2, 8193, generator=draw(0)), torch.ones(1)
    arguments = (x, None, None, None, 1e-5, True, False, 20 * one, one.int(), None, 8)
    assert torch.equal(run("norm_quantize", *arguments)[1], norms.norm_quantize(*arguments)[1])


@FEW
@given(IMAGES, TOKENS, CHANNELS, st.integers(1, 6), DTYPES, st.booleans(), st.booleans(), st.booleans(), SEEDS)
@example(2, 9, 300, 4, torch.float32, True, True, True, 0)
@example(1, 7, 33, 3, torch.bfloat16, False, False, False, 1)
def test_a_causal_convolution_is_the_references(images, tokens, channels, taps, dtype, bias, silu, strided, seed):
    random = draw(seed)
    x = rows_of_more(torch.randn(images, tokens, channels, generator=random).to(dtype), strided)
    weight = torch.randn(channels, taps, generator=random)
    bias = torch.randn(channels, generator=random) if bias else None
    y = run("causal_conv1d", x, weight, bias, silu)
    exact = convolution_1d.causal_conv1d(x.double(), weight.double(), None if bias is None else bias.double(), silu)
    assert y.dtype == dtype and relative(y, exact) <= ROUNDING[dtype]


def test_a_float64_convolution_is_exact():
    x, weight, bias = (torch.randn(*shape, generator=draw(0)).double() for shape in ((2, 5, 3), (3, 4), (3,)))
    assert torch.equal(run("causal_conv1d", x, weight, bias, True), convolution_1d.causal_conv1d(x, weight, bias, True))


@FEW
@given(IMAGES, TOKENS, CHANNELS, st.integers(1, 5), st.integers(1, 3), BITS, DTYPES, OPTIONAL, st.booleans(), SEEDS)
@example(2, 17, 100, 4, 2, 8, torch.float32, 7, True, 0)
@example(1, 9, 40, 4, 1, 4, torch.bfloat16, 5, False, 1)
@example(1, 1, 3, 2, 3, 8, torch.float16, 0, False, 2)
@example(0, 5, 3, 4, 2, 8, torch.float32, 7, False, 3)
def test_directional_convolutions_and_codes_are_the_references(
    images, tokens, channels, taps, directions, bits, dtype, optional, strided, seed
):
    random = draw(seed)
    x = rows_of_more(torch.randn(images, tokens, channels, generator=random).to(dtype), strided)
    weight = torch.randn(directions, channels, taps, generator=random)
    bias = torch.randn(directions, channels, generator=random) if optional & 1 else None
    order = torch.stack([torch.randperm(tokens, generator=random) for _ in range(directions)])
    scales = directional_qparams(directions, tokens, optional & 2, bits, random)
    inv_smooth = torch.rand(directions, channels, generator=random) if optional & 4 else None
    arguments = (x, weight, bias, order, *scales, inv_smooth, bits)
    u, codes = run("conv1d_quantize", *arguments)
    exact, want = convolution_1d.conv1d_quantize(x.double(), *arguments[1:])
    assert u.dtype == dtype and u.shape == exact.shape and relative(u, exact) <= 2 * ROUNDING[dtype]
    assert_same_codes(codes, want)


@FEW
@given(
    IMAGES,
    st.integers(0, 4),
    st.sampled_from([1, 2, 5, 9]),
    CHANNELS,
    st.sampled_from([(3, 3), (1, 1), (1, 3), (5, 3)]),
    st.integers(1, 4),
    BITS,
    DTYPES,
    OPTIONAL,
    st.booleans(),
    SEEDS,
)
@example(2, 3, 5, 100, (3, 3), 4, 8, torch.float32, 7, True, 0)
@example(1, 2, 5, 40, (3, 5), 2, 4, torch.bfloat16, 5, False, 1)
@example(1, 1, 1, 3, (3, 3), 1, 8, torch.float16, 0, False, 2)
@example(0, 3, 5, 8, (3, 3), 2, 8, torch.float32, 7, False, 3)
def test_convolutions_of_maps_and_codes_are_the_references(
    images, height, width, channels, kernel, directions, bits, dtype, optional, strided, seed
):
    random = draw(seed)
    tokens = height * width
    x = rows_of_more(torch.randn(images, tokens, channels, generator=random).to(dtype), strided)
    weight = torch.randn(channels, *kernel, generator=random)
    bias = torch.randn(channels, generator=random) if optional & 1 else None
    scales = directional_qparams(directions, tokens, optional & 2, bits, random)
    inv_smooth = torch.rand(directions, channels, generator=random) if optional & 4 else None
    arguments = (weight, bias, height, width, *scales, inv_smooth, bits)
    u, codes = run("conv2d_quantize", x, *arguments)
    assert u.dtype == dtype and u.shape == x.shape and codes.shape == (directions, *x.shape)
    if u.numel():
        exact, want = convolution_2d.conv2d_quantize(x.float(), *arguments)
        assert relative(u, exact) <= 2 * ROUNDING[dtype]
        assert_same_codes(codes, want)


STACKS = st.sampled_from([None, None, 1, 3])
LINEARS = (STACKS, IMAGES, st.sampled_from([0, 1, 17, 33, 70]), st.sampled_from([1, 12, 16, 64, 65, 130]))
FEATURES = st.sampled_from([0, 1, 7, 16, 33, 64, 70, 130])


def assert_cast(y, exact, dtype):
    """One cast of the float32 result; the interpreter's to bfloat16 truncates, a GPU's rounds."""
    assert y.dtype == dtype
    truncated = (exact.contiguous().view(torch.int32) & -(2**16)).view(torch.float32).to(dtype)
    assert torch.equal(y, exact.to(dtype)) or (dtype == torch.bfloat16 and torch.equal(y, truncated))


@FEW
@given(*LINEARS, FEATURES, st.sampled_from([4, 8]), KINDS, DTYPES, st.booleans(), SEEDS)
@example(None, 1, 70, 130, 70, 8, "token", torch.float32, True, 0)
@example(3, 2, 17, 65, 33, 4, "token", torch.bfloat16, True, 1)
@example(2, 1, 33, 12, 70, 8, "tensor", torch.float16, False, 2)
@example(None, 1, 530, 16, 70, 8, "image", torch.float32, True, 3)
@example(None, 1, 1, 100, 1, 4, "token", torch.float32, False, 4)
@example(3, 0, 5, 16, 16, 8, "token", torch.float32, True, 5)
def test_packed_linears_are_the_references_to_the_last_bit(
    stack, images, tokens, channels, features, bits, kind, dtype, bias, seed
):
    arguments = linear_inputs(stack, images, tokens, channels, features, bits, kind, bias, draw(seed))
    assert_cast(run("linear_packed", *arguments, dtype), linears.linear_packed(*arguments, torch.float32), dtype)


@FEW
@given(*LINEARS, FEATURES, st.sampled_from([4, 8]), KINDS, st.sampled_from([0, 8]), SEEDS)
@example(2, 1, 17, 65, 33, 4, "token", 0, 0)
@example(None, 1, 17, 65, 33, 4, "token", 8, 1)
@example(None, 1, 5, 12, 70, 8, "token", 0, 2)
def test_weights_may_lie_in_rows(stack, images, tokens, channels, features, bits, kind, more, seed):
    x, *qparams_of, tiles, weight_sum, scale, bias = linear_inputs(
        stack, images, tokens, channels, features, bits, kind, True, draw(seed)
    )
    codes = F.pad(layouts.unpack_weight(tiles, features, channels), (0, -channels % 16 + more))
    rows = layouts.pack_int4(codes) if bits == 4 else codes
    y = run("linear_packed", x, *qparams_of, rows, weight_sum, scale, bias, torch.float32)
    assert torch.equal(y, linears.linear_packed(x, *qparams_of, tiles, weight_sum, scale, bias, torch.float32))


@FEW
@given(*LINEARS[1:], FEATURES, st.sampled_from([4, 8]), KINDS, DTYPES, st.booleans(), SEEDS)
@example(1, 17, 130, 33, 8, "token", torch.float32, True, 0)
@example(2, 17, 65, 7, 4, "image", torch.bfloat16, True, 1)
@example(0, 5, 16, 16, 8, "token", torch.float32, False, 2)
def test_linears_are_the_references_to_the_last_bit(images, tokens, channels, features, bits, kind, dtype, bias, seed):
    random = draw(seed)
    x, scale, zero_point, _, _, weight_scale, bias = linear_inputs(
        None, images, tokens, channels, features, bits, kind, bias, random
    )
    half = 2 ** (bits - 1)
    weight = torch.randint(1 - half, half, (features, channels), generator=random, dtype=torch.int8)
    stored = layouts.pack_int4(weight) if bits == 4 else weight
    arguments = (x, scale, zero_point, stored, weight_scale, bias)
    assert_cast(run("linear", *arguments, dtype), linears.linear(*arguments, torch.float32), dtype)


def test_the_largest_accumulators_are_exact():
    for x, w, z in ((-128, -127, 127), (127, 127, -128)):
        codes, weight = torch.full((1, 3, 448), x, dtype=torch.int8), torch.full((8, 448), w, dtype=torch.int8)
        one, zero_point = torch.ones(1), torch.full((1,), z, dtype=torch.int32)
        y = run("linear", codes, one, zero_point, weight, torch.ones(8), None, torch.float32)
        assert torch.equal(y, torch.full_like(y, 448.0 * (x - z) * w))


@FEW
@given(*LINEARS[1:], FEATURES, st.sampled_from([4, 8]), KINDS, KINDS, *[st.booleans()] * 3, SEEDS)
@example(1, 33, 65, 70, 8, "token", "image", True, True, False, 0)
@example(2, 17, 65, 33, 4, "tensor", "token", False, False, True, 1)
def test_codes_after_a_gelu_are_the_references_but_for_ties(
    images, tokens, channels, features, bits, kind, new_kind, bias, smooth, rotated, seed
):
    random = draw(seed)
    linear = linear_inputs(None, images, tokens, channels, features, bits, kind, bias, random)
    linear = (linear[0], linear[1] / 40, *linear[2:])
    scale, zero_point = qparams(new_kind, images, tokens, bits, random)
    inv_smooth = torch.rand(features, generator=random) if smooth else None
    arguments = (*linear, rotated, 1 / (scale * channels**0.5), zero_point, inv_smooth, bits)
    codes = run("linear_gelu_quantize", *arguments)
    assert codes.dtype == torch.int8
    assert_same_codes(codes, linears.linear_gelu_quantize(*arguments))


@pytest.mark.slow
def test_every_tile_of_a_linear_gives_the_same_numbers(monkeypatch):
    from ptq4vm.backend.triton import linear

    arguments = (*linear_inputs(2, 1, 300, 130, 200, 8, "token", True, draw(0)), torch.float32)
    want = linears.linear_packed(*arguments)
    for rows, features in ((1, 300), (300, 16), (300, 64), (5000, 300)):
        tile = linear.tile_of(rows, features)
        monkeypatch.setattr(linear, "tile_of", lambda *sizes, tile=tile: tile)
        assert torch.equal(run("linear_packed", *arguments), want)
        monkeypatch.undo()


def one_mistake(name, arguments, place, value):
    arguments = list(arguments)
    arguments[place] = value
    with pytest.raises(ValueError, match=f"ptq4vm::{name}: ") as error:
        on_gpus[name](*arguments)
    return str(error.value)


def test_operators_check_what_kernels_rely_on():
    x = torch.zeros(2, 7, 3)
    five, zeros = torch.ones(5), torch.zeros(5, dtype=torch.int32)
    way_out = "calibrate at this resolution or use Granularity.PER_TENSOR"
    good = (x, torch.ones(7), torch.zeros(7, dtype=torch.int32), None, 8)
    assert f"token scales were calibrated for 5 tokens, the input has 7; {way_out}" in one_mistake(
        "quantize", good, 1, five
    )
    assert "7 scales and 5 zero points" in one_mistake("quantize", good, 2, zeros)
    assert "inv_smooth has another shape" in one_mistake("quantize", good, 3, five)
    assert "between 2 and 8, got 9" in one_mistake("quantize", good, 4, 9)
    assert "do not fit" in one_mistake("quantize", good, 1, torch.ones(3, 7))

    linear = (*linear_inputs(3, 1, 7, 12, 16, 8, "token", True, draw(0)), torch.float32)
    assert "x must be int8" in one_mistake("linear_packed", linear, 0, linear[0].int())
    assert "need as many" in one_mistake("linear_packed", linear, 1, torch.ones(7))
    assert "pack_weight" in one_mistake("linear_packed", linear, 3, linear[3][:, :, :, :4])
    assert "weight_sum" in one_mistake("linear_packed", linear, 4, linear[4][:, :4])
    assert "bias" in one_mistake("linear_packed", linear, 6, linear[6][:, :4])
    assert "3 stacked inputs" in one_mistake("linear_packed", linear, 1, linear[1][:2])
    assert "2 stacked inputs" in one_mistake("linear_packed", linear, 0, linear[0][:2])
    single = (*linear_inputs(None, 1, 7, 12, 16, 8, "token", True, draw(0))[:3], None, torch.ones(16), None)
    assert "has 12 columns, this one 5" in one_mistake(
        "linear", (*single, torch.float32), 3, torch.zeros(16, 5, dtype=torch.int8)
    )
