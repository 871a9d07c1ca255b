"""csrc/cuda/conv.cu and conv2d.cu under the emulator, against the fused references."""

import pytest
import torch
from emulated.cuda_emulator import (
    DTYPES,
    SUPPRESSED,
    Library,
    QParams,
    Rows,
    Struct,
    boolean,
    int64,
    is_caught,
    pointer,
    poisoned,
    qparams_struct,
    rows_of,
)
from helpers.draws import assert_same_codes, directional_qparams, draw, relative, rows_of_more
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm.ops import convolution_1d, convolution_2d

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
BITS, OPTIONAL, SEEDS = st.integers(2, 8), st.integers(0, 7), st.integers(0, 2**20)


class Conv(Struct):
    _fields_ = (
        ("x", Rows),
        ("weight", pointer),
        ("bias", pointer),
        ("order", pointer),
        ("y", pointer),
        ("codes", pointer),
        ("qparams", QParams),
        ("directions", int64),
        ("batch", int64),
        ("tokens", int64),
        ("channels", int64),
        ("taps", int64),
        ("silu", boolean),
    )


class Conv2d(Struct):
    _fields_ = (
        ("x", Rows),
        ("weight", pointer),
        ("bias", pointer),
        ("y", pointer),
        ("codes", pointer),
        ("qparams", QParams),
        ("directions", int64),
        ("batch", int64),
        ("height", int64),
        ("width", int64),
        ("channels", int64),
        ("rows", int64),
        ("columns", int64),
    )


def conv1d_quantize(library: Library, x, weight, bias, order, inv_scale, zero_point, inv_smooth, bits):
    directions, channels, taps = weight.shape
    y = poisoned(directions, *x.shape, dtype=x.dtype)
    codes = poisoned(directions, *x.shape, dtype=torch.int8)
    library.run(
        Conv(
            x=rows_of(x),
            weight=weight,
            bias=bias,
            order=order.int().contiguous(),
            y=y,
            codes=codes,
            qparams=qparams_struct(inv_scale, zero_point, inv_smooth, bits, directions),
            directions=directions,
            batch=x.shape[0],
            tokens=x.shape[1],
            channels=channels,
            taps=taps,
            silu=True,
        )
    )
    return y, codes


def causal_conv1d(library: Library, x, weight, bias, silu):
    y = poisoned(*x.shape, dtype=x.dtype)
    sizes = {"batch": x.shape[0], "tokens": x.shape[1], "channels": x.shape[2], "taps": weight.shape[1]}
    library.run(Conv(x=rows_of(x), weight=weight, bias=bias, y=y, directions=1, silu=silu, **sizes))
    return y


def conv2d_quantize(library: Library, x, weight, bias, height, width, inv_scale, zero_point, inv_smooth, bits):
    channels, rows, columns = weight.shape
    directions = len(inv_scale)
    y, codes = poisoned(*x.shape, dtype=x.dtype), poisoned(directions, *x.shape, dtype=torch.int8)
    library.run(
        Conv2d(
            x=rows_of(x),
            weight=weight,
            bias=bias,
            y=y,
            codes=codes,
            qparams=qparams_struct(inv_scale, zero_point, inv_smooth, bits, directions),
            directions=directions,
            batch=x.shape[0],
            height=height,
            width=width,
            channels=channels,
            rows=rows,
            columns=columns,
        )
    )
    return y, codes


def conv1d_inputs(dtype, images, tokens, channels, taps, directions, bits, optional, strided, seed):
    random = draw(seed)
    x = rows_of_more(torch.randn(images, tokens, channels, generator=random).to(dtype), strided)
    weight = torch.randn(directions, channels, taps, generator=random)
    bias = torch.randn(directions, channels, generator=random) if optional & 1 else None
    order = torch.stack([torch.randperm(tokens, generator=random) for _ in range(directions)])
    qparams = directional_qparams(directions, tokens, optional & 2, bits, random)
    inv_smooth = torch.rand(directions, channels, generator=random) if optional & 4 else None
    return x, weight, bias, order, *qparams, inv_smooth, bits


@DTYPES
@given(
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, 3, 7, 8, 9, 31, 65]),
    st.sampled_from([1, 4, 15, 16, 33, 100, 132]),
    st.sampled_from([1, 2, 3, 4, 4, 4, 6]),
    st.integers(1, 3),
    BITS,
    OPTIONAL,
    st.booleans(),
    SEEDS,
)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
def test_directional_convolutions_and_codes_are_the_references(
    emulated, dtype, images, tokens, channels, taps, directions, bits, optional, strided, seed
):
    inputs = conv1d_inputs(dtype, images, tokens, channels, taps, directions, bits, optional, strided, seed)
    x, weight, bias, order = inputs[:4]
    u, codes = conv1d_quantize(emulated("conv"), *inputs)
    for k in range(directions):
        b = None if bias is None else bias[k].double()
        exact = convolution_1d.causal_conv1d(x[:, order[k]].double(), weight[k].double(), b, True)
        assert relative(u[k][:, order[k]], exact) <= ROUNDING[dtype]
    assert_same_codes(codes, convolution_1d.conv1d_quantize(*inputs)[1])


@DTYPES
@given(
    st.integers(0, 2),
    st.sampled_from([0, 1, 3, 8, 33]),
    st.sampled_from([1, 4, 17, 32]),
    st.sampled_from([1, 3, 4, 6]),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
def test_a_causal_convolution_is_the_references(emulated, dtype, images, tokens, channels, taps, silu, strided, seed):
    random = draw(seed)
    x = rows_of_more(torch.randn(images, tokens, channels, generator=random).to(dtype), strided)
    weight, bias = torch.randn(channels, taps, generator=random), torch.randn(channels, generator=random)
    y = causal_conv1d(emulated("conv"), x, weight, bias, silu)
    assert (
        relative(y, convolution_1d.causal_conv1d(x.double(), weight.double(), bias.double(), silu)) <= ROUNDING[dtype]
    )
    assert torch.equal(y, causal_conv1d(emulated("conv"), x.float(), weight, bias, silu).to(dtype))


def test_silu_keeps_its_ends(emulated):
    inf = torch.inf
    x = torch.tensor([torch.nan, inf, 1e30, 100, 88, 20, 1e-30, 0, -1e-30, -20, -80, -100, -1e30]).repeat(3)
    y = causal_conv1d(emulated("conv"), x[None, None], torch.ones(len(x), 1), None, True)[0, 0]
    want = torch.nn.functional.silu(x.double()).float()
    torch.testing.assert_close(y, want, rtol=5e-6, atol=1e-30, equal_nan=True)


def conv2d_inputs(dtype, images, height, width, channels, kernel, directions, bits, optional, strided, seed):
    random = draw(seed)
    tokens = height * width
    x = rows_of_more(torch.randn(images, tokens, channels, generator=random).to(dtype), strided)
    weight = torch.randn(channels, *kernel, generator=random)
    bias = torch.randn(channels, generator=random) if optional & 1 else None
    qparams = directional_qparams(directions, tokens, optional & 2, bits, random)
    inv_smooth = torch.rand(directions, channels, generator=random) if optional & 4 else None
    return x, weight, bias, height, width, *qparams, inv_smooth, bits


@DTYPES
@given(
    st.integers(0, 2),
    st.integers(0, 6),
    st.sampled_from([1, 2, 3, 7, 9]),
    st.sampled_from([1, 4, 15, 16, 33, 100, 132]),
    st.sampled_from([(3, 3), (3, 3), (1, 1), (1, 3), (5, 3), (7, 7)]),
    st.integers(0, 4),
    BITS,
    OPTIONAL,
    st.booleans(),
    SEEDS,
)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
def test_convolutions_of_maps_and_codes_are_the_references(
    emulated, dtype, images, height, width, channels, kernel, directions, bits, optional, strided, seed
):
    inputs = conv2d_inputs(dtype, images, height, width, channels, kernel, directions, bits, optional, strided, seed)
    x, weight, bias = inputs[:3]
    u, codes = conv2d_quantize(emulated("conv2d"), *inputs)
    if not u.numel():
        return
    maps = x.double().unflatten(1, (height, width)).permute(0, 3, 1, 2)
    exact = torch.nn.functional.conv2d(
        maps,
        weight.double()[:, None],
        None if bias is None else bias.double(),
        padding=(kernel[0] // 2, kernel[1] // 2),
        groups=channels,
    )
    exact = torch.nn.functional.silu(exact).permute(0, 2, 3, 1).flatten(1, 2)
    assert relative(u, exact) <= ROUNDING[dtype]
    assert_same_codes(codes, convolution_2d.conv2d_quantize(*inputs)[1])


MISTAKES = [
    ("conv.cu", "qparams(c.qparams, token, direction)", "qparams(c.qparams, first + t, direction)"),
    ("conv.cu", "w[v][k] * values[t + k][v]", "w[v][TAPS - 1 - k] * values[t + k][v]"),
    ("conv.cu", "0 <= position && position < c.tokens", "position < c.tokens"),
    ("conv.cu", "return order ? checked_token(order[position], 0, c.tokens) : position;", "return position;"),
    ("conv2d.cu", "qparams(c.qparams, token + t, k)", "qparams(c.qparams, token + t)"),
    ("conv2d.cu", "if (from < 0 || from >= c.height) continue;", "if (from < 0) continue;"),
    ("conv2d.cu", "0 <= w && w < c.width", "true"),
    ("conv2d.cu", "k * c.batch * tokens * c.channels + at", "k * tokens * c.channels + at"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "text", "other"), [("conv.cu", None, None), ("conv2d.cu", None, None), *MISTAKES])
def test_mistakes_are_seen(emulated, file, text, other):
    library = emulated(file.removesuffix(".cu"), change=text and (file, text, other))
    if file == "conv.cu":
        inputs = conv1d_inputs(torch.float32, 2, 9, 16, 4, 2, 8, 7, False, 0)
        ours, theirs = conv1d_quantize, convolution_1d.conv1d_quantize
    else:
        inputs = conv2d_inputs(torch.float32, 2, 3, 5, 16, (3, 3), 2, 8, 7, False, 0)
        ours, theirs = conv2d_quantize, convolution_2d.conv2d_quantize

    def check():
        (u, codes), (exact, want) = ours(library, *inputs), theirs(*inputs)
        assert relative(u, exact.double()) <= 1e-5
        assert_same_codes(codes, want)

    assert is_caught(check) == (text is not None)
