"""csrc/cuda/rotate.cu: rotated rows, and their codes."""

import math

import pytest
import torch
from emulated.cuda_emulator import (
    DTYPES,
    SUPPRESSED,
    QParams,
    Rotation,
    Struct,
    boolean,
    int32,
    int64,
    is_caught,
    kind,
    offset_by,
    pointer,
    poisoned,
    qparams_struct,
)
from helpers.draws import KINDS, assert_same_codes, draw, qparams
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ptq4vm.ops import quantization, rotation

ROWS = st.sampled_from([0, 1, 2, 5, 9])
CHANNELS = st.sampled_from([1, 2, 3, 6, 12, 15, 16, 17, 24, 34, 40, 64, 96, 120, 192, 384, 1024, 1536])


class Rotate(Struct):
    _fields_ = (("x", pointer), ("y", pointer), ("type", int32), ("rotation", Rotation), ("rows", int64))


class RotateQuantize(Struct):
    _fields_ = (
        ("x", pointer),
        ("x_type", int32),
        ("gelu", boolean),
        ("rotation", Rotation),
        ("codes", pointer),
        ("qparams", QParams),
        ("rows", int64),
    )


def rotate(library, x):
    y = poisoned(*x.shape, dtype=x.dtype)
    rows = x.shape[:-1].numel()
    library.run(Rotate(x=x, y=y, type=kind(x), rotation=Rotation.of(x.shape[-1]), rows=rows))
    return y


def rotate_quantize(library, x, gelu, inv_scale, zero_point, inv_smooth, bits):
    codes = poisoned(*x.shape, dtype=torch.int8)
    library.run(
        RotateQuantize(
            x=x,
            x_type=kind(x),
            gelu=gelu,
            rotation=Rotation.of(x.shape[-1]),
            codes=codes,
            qparams=qparams_struct(inv_scale, zero_point, inv_smooth, bits),
            rows=x.shape[:-1].numel(),
        )
    )
    return codes


def assert_rotated(library, x):
    ours = rotate(library, x)
    tolerance = 1e-6 if x.dtype is torch.float32 else 2**-8
    assert torch.allclose(ours, rotation.rotate(x), rtol=tolerance, atol=tolerance * x.shape[-1] ** 0.5)


def assert_coded(library, x, gelu, inv_scale, zero_point, inv_smooth, bits):
    arguments = (inv_scale, zero_point, inv_smooth, bits)
    codes = rotate_quantize(library, x, gelu, *arguments)
    assert_same_codes(codes, rotation.rotate_quantize(x, gelu, *arguments))
    if not gelu:  # one arithmetic, with or without codes
        turned = rotate(library, x.float() if inv_smooth is None else x.float() * inv_smooth)
        assert torch.equal(codes, quantization.quantize(turned, inv_scale, zero_point, None, bits))


@DTYPES
@given(st.integers(1, 2), ROWS, CHANNELS, st.integers(0, 1), st.integers(0, 2**20))
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
@example(1, 5, 1536, 0, 0)
@example(1, 5, 192, 0, 0)
def test_rotated_rows_are_the_references(emulated, dtype, images, tokens, channels, offset, seed):
    x = torch.randn(images, tokens, channels, generator=draw(seed)).to(dtype)
    assert_rotated(emulated("rotate"), offset_by(offset, x))


@DTYPES
@given(
    st.integers(1, 2),
    ROWS,
    CHANNELS,
    st.integers(2, 8),
    KINDS,
    st.booleans(),
    st.booleans(),
    st.integers(0, 1),
    st.integers(0, 2**20),
)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
@example(1, 5, 1536, 8, "token", True, True, 0, 0)
@example(1, 5, 192, 8, "token", False, True, 0, 0)
def test_rotated_codes_are_the_references(
    emulated, dtype, images, tokens, channels, bits, kind_of, gelu, smooth, offset, seed
):
    random = draw(seed)
    scale, zero_point = qparams(kind_of, images, tokens, bits, random)
    x = torch.randn(images, tokens, channels, generator=random).to(dtype)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    arguments = (1 / (scale * 2 ** (8 - bits) / 20), zero_point, inv_smooth, bits)
    assert_coded(emulated("rotate"), offset_by(offset, x), gelu, *arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read_and_written_as_it_is(emulated, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = torch.cat((x, x[: 1023 - len(x) % 1023])).view(-1, 1023)  # so many channels are not mixed
    y = rotate(emulated("rotate"), rows).flatten()[: len(x)]
    assert torch.equal(y.isnan(), x.isnan()) and torch.equal(y[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_16_bits_as_torch_does(emulated, dtype):
    """Sums of two such numbers, halves among them, and those that are too large or too small."""
    random = draw(0)
    x = torch.randint(-(2**15), 2**15, (4096, 2), generator=random).to(torch.int16).view(dtype)
    x = x[x.isfinite().all(1)]
    y = rotate(emulated("rotate"), x)
    exact = (x.float() @ torch.tensor([[1.0, 1.0], [1.0, -1.0]])) * torch.tensor(1 / math.sqrt(2))
    assert torch.equal(y, exact.to(dtype))


def test_rows_do_not_know_each_other(emulated):
    for channels in (12, 192, 1536):
        x = torch.randn(5, channels, generator=draw(0))
        together = rotate(emulated("rotate"), x)
        assert all(torch.equal(together[i : i + 1], rotate(emulated("rotate"), x[i : i + 1])) for i in range(5))


ROW, END = "row[place(first + (i << log_half))] = v[i];\n  }", "\n  Team<WARPS>::sync();"
MISTAKES = [
    ("rotate.cuh", ROW + END, ROW),
    ("rotate.cuh", "__syncwarp();", ""),
    ("rotate.cuh", "__syncthreads();", ""),
    ("rotate.cuh", "q.matrix[j * size + k]", "q.matrix[(j + 1) % size * size + k]"),
    ("rotate.cuh", "v[i | half] = a - b", "v[i | half] = b - a"),
    ("rotate.cuh", "SIZE * shared_row(channels)", "SIZE * channels"),
    ("rotate.cu", "value[i] = gelu(value[i])", "value[i] = silu(value[i])"),
    ("rotate.cu", "load<N>(inv_smooth + d, smooth)", "load<N>(inv_smooth, smooth)"),
    ("rotate.cu", "{ store<N>(y + d, value)", "{ if (d) store<N>(y + d, value)"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, *MISTAKES])
def test_mistakes_are_seen(emulated, change):
    library = emulated("rotate", change=change)

    def check():
        for channels in (192, 1536):
            x = torch.randn(5, channels, generator=draw(0))
            assert_rotated(library, x)
            for gelu in (False, True):
                zero_point = torch.arange(5, dtype=torch.int32)
                assert_coded(library, x, gelu, torch.full((5,), 20.0), zero_point, torch.rand(channels), 8)

    assert is_caught(check) == (change is not None)
