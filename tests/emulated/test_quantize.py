"""csrc/cuda/quantize.cu: codes and qparams that equal the reference's."""

import pytest
import torch
from emulated.cuda_emulator import (
    DTYPES,
    SUPPRESSED,
    QParams,
    Struct,
    int32,
    int64,
    is_caught,
    kind,
    offset_by,
    pointer,
    poisoned,
    qparams_struct,
)
from helpers.draws import KINDS, draw, qparams
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ptq4vm.ops import quantization

ROWS = st.sampled_from([0, 1, 2, 5, 17, 33])
CHANNELS = st.sampled_from([1, 3, 8, 15, 16, 24, 33, 64, 100, 200, 264, 1100])
SEEDS = st.integers(0, 2**20)


class Quantize(Struct):
    _fields_ = (
        ("x", pointer),
        ("x_type", int32),
        ("qparams", QParams),
        ("codes", pointer),
        ("rows", int64),
        ("channels", int64),
    )


class ChooseQParams(Struct):
    _fields_ = (
        ("x", pointer),
        ("x_type", int32),
        ("inv_smooth", pointer),
        ("scale", pointer),
        ("zero_point", pointer),
        ("rows", int64),
        ("channels", int64),
        ("low", int32),
        ("high", int32),
    )


class Dequantize(Struct):
    _fields_ = (
        ("x", pointer),
        ("scale", pointer),
        ("zero_point", pointer),
        ("y", pointer),
        ("rows", int64),
        ("channels", int64),
        ("scales", int64),
    )


def quantize(library, x, inv_scale, zero_point, inv_smooth, bits):
    codes = poisoned(*x.shape, dtype=torch.int8)
    of = qparams_struct(inv_scale, zero_point, inv_smooth, bits)
    rows = x.shape[:-1].numel()
    library.run(Quantize(x=x, x_type=kind(x), qparams=of, codes=codes, rows=rows, channels=x.shape[-1]))
    return codes


def choose_qparams(library, x, inv_smooth, bits):
    scale, zero_point = poisoned(*x.shape[:-1]), poisoned(*x.shape[:-1], dtype=torch.int32)
    half = 2 ** (bits - 1)
    library.run(
        ChooseQParams(
            x=x,
            x_type=kind(x),
            inv_smooth=inv_smooth,
            scale=scale,
            zero_point=zero_point,
            rows=scale.numel(),
            channels=x.shape[-1],
            low=-half,
            high=half - 1,
        )
    )
    return scale, zero_point


@DTYPES
@given(st.integers(0, 3), ROWS, CHANNELS, st.integers(2, 8), KINDS, st.booleans(), st.integers(0, 1), SEEDS)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
def test_codes_are_the_references(emulated, dtype, images, tokens, channels, bits, kind_of, smooth, offset, seed):
    random = draw(seed)
    scale, zero_point = qparams(kind_of, images, tokens, bits, random)
    x = torch.randn(images, tokens, channels, generator=random) * 10 ** (seed % 5)
    x = torch.where(torch.rand(x.shape, generator=random) < 0.3, torch.round(x) + 0.5, x).to(dtype)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    arguments = (1 / scale, zero_point, inv_smooth, bits)
    codes = quantize(emulated("quantize"), offset_by(offset, x), *arguments)
    assert torch.equal(codes, quantization.quantize(x, *arguments))


@DTYPES
def test_numbers_that_are_not_finite_have_the_references_codes(emulated, dtype):
    inf, largest = torch.inf, torch.finfo(torch.float32).max
    values = torch.tensor([torch.nan, inf, -inf, largest, -largest, 1e-45, -0.0, 127.5, -127.5]).to(dtype)
    for repeat in (1, 8):  # one number at a time, and vectors
        x = values.repeat(5, repeat)
        for bits in (2, 8):
            zero_point = torch.tensor([0, 1, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))], dtype=torch.int32)
            arguments = (torch.ones(5), zero_point, None, bits)
            assert torch.equal(quantize(emulated("quantize"), x, *arguments), quantization.quantize(x, *arguments))


def same_ranges(ours, theirs):
    """Scales and zero points; a token with NaN has no scale."""
    ordered = ~theirs[0].isnan()
    same = torch.equal(ours[0][ordered], theirs[0][ordered]) and torch.equal(ours[1], theirs[1])
    return same and torch.equal(ours[0].isnan(), ~ordered)


@DTYPES
@given(st.integers(0, 3), ROWS, CHANNELS, st.integers(2, 8), st.booleans(), SEEDS)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
@example(2, 5, 200, 8, True, 7)
def test_the_range_of_a_token_is_the_references(emulated, dtype, images, tokens, channels, bits, smooth, seed):
    random = draw(seed)
    x = (torch.randn(images, tokens, channels, generator=random) * 10.0 ** (seed % 80 - 40)).to(dtype)
    x = x.abs() if seed % 3 == 0 else x
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    ours = choose_qparams(emulated("quantize"), x, inv_smooth, bits)
    assert same_ranges(ours, quantization.choose_qparams(x, inv_smooth, bits))


def test_a_token_with_nan_has_no_range(emulated):
    x = torch.randn(3, 40, generator=draw(0))
    x[1, 39] = torch.nan
    scale, zero_point = choose_qparams(emulated("quantize"), x, None, 8)
    assert scale.isnan().tolist() == [False, True, False] and zero_point[1] == 0


@given(st.integers(0, 3), ROWS, CHANNELS, KINDS, SEEDS)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
def test_dequantized_codes_are_the_references(emulated, images, tokens, channels, kind_of, seed):
    random = draw(seed)
    codes = torch.randint(-128, 128, (images, tokens, channels), generator=random, dtype=torch.int8)
    scale, zero_point = qparams(kind_of, images, tokens, 8, random)
    y = poisoned(images, tokens, channels)
    emulated("quantize").run(
        Dequantize(
            x=codes,
            scale=scale,
            zero_point=zero_point,
            y=y,
            rows=images * tokens,
            channels=channels,
            scales=max(1, scale.numel()),
        )
    )
    assert torch.equal(y, quantization.dequantize(codes, scale, zero_point))


@pytest.mark.slow
def test_what_is_beside_the_tensors_stays(emulated):
    """Rows and channels that no team divides."""
    for channels in (1, 7, 8, 40, 264):
        for rows in (1, 3, 33):
            x, whole = torch.randn(rows, channels), poisoned(rows * channels + 64, dtype=torch.int8)
            before, codes = whole.clone(), whole[32 : 32 + rows * channels]
            of = qparams_struct(torch.ones(1), torch.zeros(1, dtype=torch.int32), None, 8)
            emulated("quantize").run(Quantize(x=x, x_type=0, qparams=of, codes=codes, rows=rows, channels=channels))
            assert torch.equal(whole[:32], before[:32]) and torch.equal(whole[-32:], before[-32:])


MISTAKES = [
    ("device.cuh", "set * q.scales + remainder(row, q.scales)", "set * q.scales + remainder(row + 1, q.scales)"),
    ("device.cuh", "load<N>(inv_smooth, smooth)", "load<N>(inv_smooth + 1, smooth)"),
    ("device.cuh", "return scaled == scaled ? shifted : 0", "return shifted"),
    ("quantize.cu", "low = warp_reduce(low, [](float a, float b) { return fminf(a, b); });", ""),
    ("quantize.cu", "__all_sync(ALL_LANES, ordered)", "ordered"),
    ("quantize.cu", "if (lane == 0) {", "if (lane == 32) {"),
    ("quantize.cu", "d += WARP_SIZE * N", "d += 2 * WARP_SIZE * N"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, *MISTAKES])
def test_mistakes_are_seen(emulated, change):
    library = emulated("quantize", change=change)
    x = torch.randn(5, 300, generator=draw(0)).round() + 0.5
    x[4, 299] = torch.nan
    inv_smooth = torch.tensor([1.0, 2.0]).repeat(150)
    zero_point = torch.arange(5, dtype=torch.int32)

    def check():
        arguments = (torch.ones(5), zero_point, inv_smooth, 8)
        assert torch.equal(quantize(library, x, *arguments), quantization.quantize(x, *arguments))
        ours = choose_qparams(library, x, inv_smooth, 8)
        assert same_ranges(ours, quantization.choose_qparams(x, inv_smooth, 8))

    assert is_caught(check) == (change is not None)
