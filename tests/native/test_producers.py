"""Producers of a linear's codes, on every instruction set: quantization, norms and convolutions with their codes."""

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import (
    CHANNELS,
    KINDS,
    ROWS,
    SUPPRESSED,
    assert_same_codes,
    assert_threads_change_no_bit,
    directional_qparams,
    draw,
    needs_library,
    qparams,
    relative,
    rows_of_more,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.ops import convolution_1d, convolution_2d, norms, quantization, rotation

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**20)
STRIDED = st.booleans()
ROTATED = CHANNELS | st.sampled_from([16, 64, 96, 128, 192, 256, 384, 1024])


@needs_library
@DTYPES
def test_numbers_that_are_not_finite_have_the_references_codes(isa, dtype):
    inf, largest = torch.inf, torch.finfo(torch.float32).max
    values = torch.tensor([torch.nan, inf, -inf, largest, -largest, 1e-45, -0.0, 127.5, -127.5]).to(dtype)
    x = values.repeat(5, 3)
    for bits in (2, 8):
        zero_point = torch.tensor([0, 1, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))], dtype=torch.int32)
        arguments = (x, torch.ones(5), zero_point, None, bits)
        assert torch.equal(ops.quantize(*arguments), quantization.quantize(*arguments))


@needs_library
@DTYPES
@given(st.integers(0, 3), ROWS, CHANNELS, st.integers(2, 8), st.booleans(), SEEDS)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_the_range_of_a_token_is_the_references(isa, dtype, images, tokens, channels, bits, smooth, seed):
    random = draw(seed)
    x = (torch.randn(images, tokens, channels, generator=random) * 10.0 ** (seed % 80 - 40)).to(dtype)
    x = x.abs() if seed % 3 == 0 else x
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    ours, theirs = ops.choose_qparams(x, inv_smooth, bits), quantization.choose_qparams(x, inv_smooth, bits)
    assert all(map(torch.equal, ours, theirs))


@needs_library
@DTYPES
@given(st.integers(0, 3), ROWS, st.integers(1, 400) | ROTATED, STRIDED, SEEDS)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_rotated_rows_and_their_gradients_are_the_references_and_do_not_know_each_other(
    isa, dtype, images, tokens, channels, strided, seed
):
    x = torch.randn(images, tokens, channels, generator=draw(seed)).to(dtype)
    ours, theirs = ops.rotate(rows_of_more(x, strided)), rotation.rotate(x)
    assert ours.dtype is dtype and ours.shape == x.shape
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * channels**0.5)
    assert all(torch.equal(ours[i], ops.rotate(x[i])) for i in range(images))
    leaf, weight = x.clone().requires_grad_(), torch.randn(x.shape, generator=draw(seed + 1)).to(dtype)
    (ops.rotate(leaf) * weight).sum().backward()
    assert torch.equal(leaf.grad, ops.rotate(weight))


@needs_library
@given(st.integers(0, 3), ROWS, CHANNELS, KINDS, SEEDS)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_dequantized_codes_are_the_references(isa, images, tokens, channels, kind, seed):
    random = draw(seed)
    codes = torch.randint(-128, 128, (images, tokens, channels), generator=random, dtype=torch.int8)
    arguments = (codes, *qparams(kind, images, tokens, 8, random))
    assert torch.equal(ops.dequantize(*arguments), quantization.dequantize(*arguments))


@needs_library
@DTYPES
@given(st.integers(0, 3), ROWS, ROTATED, st.integers(2, 8), KINDS, *[st.booleans()] * 3, st.integers(0, 7), SEEDS)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_norm_and_codes_are_the_references(
    isa, dtype, images, tokens, channels, bits, kind, rms, add, rotated, optional, seed
):
    random = draw(seed)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    scale = scale * 2 ** (8 - bits) / 20

    def normal(*shape):
        return torch.randn(shape, generator=random)

    x = (normal(images, tokens, channels) * 10.0 ** (seed % 5 - 2) + seed % 3).to(dtype)
    residual = normal(images, tokens, channels) * 10.0 ** (seed % 5 - 2) if add else None
    weight = normal(channels) if optional & 1 else None
    bias = normal(channels) if optional & 2 and not rms else None
    inv_smooth = torch.rand(channels, generator=random) if optional & 4 else None
    arguments = (x, residual, weight, bias, 1e-5, rms, rotated, 1 / scale, zero_point, inv_smooth, bits)
    total, codes = ops.norm_quantize(*arguments)
    want, want_codes = norms.norm_quantize(*arguments)
    assert torch.equal(total, want) and total.dtype == torch.float32
    assert_same_codes(codes, want_codes)


@needs_library
@DTYPES
@given(st.integers(0, 3), ROWS, ROTATED, st.integers(2, 8), KINDS, *[st.booleans()] * 2, SEEDS)
@settings(max_examples=60, suppress_health_check=SUPPRESSED)
def test_rotated_codes_are_the_references(isa, dtype, images, tokens, channels, bits, kind, gelu, smooth, seed):
    random = draw(seed)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    x = torch.randn(images, tokens, channels, generator=random).to(dtype)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    arguments = (1 / (scale * 2 ** (8 - bits) / 20), zero_point, inv_smooth, bits)
    codes = ops.rotate_quantize(x, gelu, *arguments)
    assert_same_codes(codes, rotation.rotate_quantize(x, gelu, *arguments))
    if not gelu:
        inv_scale, zero_point, _, bits = arguments
        turned = ops.rotate(x.float() * inv_smooth if smooth else x.float())
        assert torch.equal(codes, ops.quantize(turned, inv_scale, zero_point, None, bits))


@needs_library
@DTYPES
@given(
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, 3, 7, 8, 9, 31, 65]),
    st.sampled_from([1, 15, 16, 17, 33, 100]),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(2, 8),
    st.integers(0, 7),
    STRIDED,
    SEEDS,
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_directional_convolutions_and_codes_are_the_references(
    isa,
    dtype,
    images,
    tokens,
    channels,
    taps,
    directions,
    bits,
    optional,
    strided,
    seed,
):
    random = draw(seed)
    x = rows_of_more(torch.randn(images, tokens, channels, generator=random).to(dtype), strided)
    weight = torch.randn(directions, channels, taps, generator=random)
    bias = torch.randn(directions, channels, generator=random) if optional & 1 else None
    order = torch.stack([torch.randperm(tokens, generator=random) for _ in range(directions)])
    order = order if seed % 2 else order.int()
    inv_scale, zero_point = directional_qparams(directions, tokens, optional & 2, bits, random)
    inv_smooth = torch.rand(directions, channels, generator=random) if optional & 4 else None
    codes_of = (inv_scale, zero_point, inv_smooth, bits)
    u, codes = ops.conv1d_quantize(x, weight, bias, order, *codes_of)
    want, want_codes = convolution_1d.conv1d_quantize(x, weight, bias, order, *codes_of)
    double = None if bias is None else bias.double()
    for k, tokens_of in enumerate(order.long()):
        exact = convolution_1d.causal_conv1d(
            x[:, tokens_of].double(), weight[k].double(), None if bias is None else double[k], True
        )
        assert relative(u[k][:, tokens_of], exact) <= (1e-6 if dtype == torch.float32 else 2**-8)
    assert u.dtype == dtype and u.is_contiguous() and u.shape == want.shape == codes.shape
    assert_same_codes(codes, want_codes)


@needs_library
@DTYPES
@given(
    st.integers(0, 2),
    st.integers(0, 6),
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from([1, 15, 16, 17, 33, 100]),
    st.sampled_from([(3, 3), (3, 3), (1, 1), (1, 3), (5, 3), (7, 7)]),
    st.integers(0, 4),
    st.integers(2, 8),
    st.integers(0, 7),
    STRIDED,
    SEEDS,
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_convolutions_of_maps_and_codes_are_the_references(
    isa,
    dtype,
    images,
    height,
    width,
    channels,
    kernel,
    directions,
    bits,
    optional,
    strided,
    seed,
):
    random = draw(seed)
    tokens = height * width
    x = rows_of_more(torch.randn(images, tokens, channels, generator=random).to(dtype), strided)
    weight = torch.randn(channels, *kernel, generator=random)
    bias = torch.randn(channels, generator=random) if optional & 1 else None
    inv_scale, zero_point = directional_qparams(directions, tokens, optional & 2, bits, random)
    inv_smooth = torch.rand(directions, channels, generator=random) if optional & 4 else None
    arguments = (weight, bias, height, width, inv_scale, zero_point, inv_smooth, bits)
    u, codes = ops.conv2d_quantize(x, *arguments)
    assert u.dtype == dtype and u.is_contiguous() and u.shape == x.shape and codes.shape == (directions, *x.shape)
    if not u.numel():
        return
    maps = x.double().unflatten(1, (height, width)).permute(0, 3, 1, 2)
    padding = (kernel[0] // 2, kernel[1] // 2)
    exact = F.conv2d(
        maps, weight.double()[:, None], None if bias is None else bias.double(), padding=padding, groups=channels
    )
    exact = F.silu(exact).permute(0, 2, 3, 1).flatten(1, 2)
    assert relative(u, exact) <= (1e-6 if dtype == torch.float32 else 2**-8)
    assert_same_codes(codes, convolution_2d.conv2d_quantize(x, *arguments)[1])


@needs_library
@given(
    st.integers(0, 2),
    st.sampled_from([0, 1, 3, 8, 33]),
    st.sampled_from([1, 15, 17, 33]),
    st.integers(1, 6),
    st.booleans(),
    STRIDED,
    SEEDS,
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_a_convolution_in_bfloat16_is_the_one_in_float32_rounded(
    isa,
    images,
    tokens,
    channels,
    taps,
    silu,
    strided,
    seed,
):
    random = draw(seed)
    x = rows_of_more(torch.randn(images, tokens, channels, generator=random).bfloat16(), strided)
    weight, bias = torch.randn(channels, taps, generator=random), torch.randn(channels, generator=random)
    want = ops.causal_conv1d(x.float(), weight, bias, silu).bfloat16()
    assert torch.equal(ops.causal_conv1d(x, weight, bias, silu), want)


@needs_library
def test_silu_keeps_its_ends(isa):
    """No overflow on the way, for one row of inputs as they are."""
    inf = torch.inf
    x = torch.tensor([torch.nan, inf, 1e30, 100, 88, 20, 1e-30, 0, -1e-30, -20, -80, -100, -1e30]).repeat(3)
    y = ops.causal_conv1d(x[None, None], torch.ones(len(x), 1), None, True)[0, 0]
    want = F.silu(x.double()).float()
    torch.testing.assert_close(y, want, rtol=5e-6, atol=1e-30, equal_nan=True)


@needs_library
@DTYPES
def test_the_number_of_threads_changes_no_bit(isa, dtype):
    random = draw(0)
    x = torch.randn(2, 195, 200, generator=random).to(dtype)
    order = torch.stack((torch.arange(195), torch.arange(195).flip(0)))
    codes_of = (torch.rand(2, 195, generator=random) * 20, torch.ones(2, 195, dtype=torch.int32), None, 8)
    weight, taps = torch.randn(200, 3, 3, generator=random), torch.randn(2, 200, 4, generator=random)
    one = (codes_of[0][0], codes_of[1][0], None, 8)

    def everything():
        return (
            *ops.conv1d_quantize(x, taps, None, order, *codes_of),
            *ops.conv2d_quantize(x, weight, None, 15, 13, *codes_of),
            *ops.norm_quantize(x, x, None, None, 1e-5, False, True, *one),
            ops.rotate_quantize(x, True, *one),
            ops.rotate(x),
            ops.causal_conv1d(x, taps[0], None, True),
            ops.quantize(x, *one),
            *ops.choose_qparams(x, None, 8),
            ops.dequantize(ops.quantize(x, *one), *one[:2]),
        )

    assert_threads_change_no_bit(everything)


@needs_library
def test_wrong_shapes_are_told(isa):
    x, order = torch.randn(1, 6, 4), torch.arange(6)[None]
    qparams_of = (torch.ones(1, 6), torch.ones(1, 6, dtype=torch.int32), None, 8)
    wrong = {
        "names token 6": lambda: ops.conv1d_quantize(x, torch.ones(1, 4, 3), None, order + 1, *qparams_of),
        "calibrated for 6 tokens": lambda: ops.conv1d_quantize(
            x[:, :5], torch.ones(1, 4, 3), None, order[:, :5], *qparams_of
        ),
        "has not the 6 tokens": lambda: ops.conv2d_quantize(x, torch.ones(4, 3, 3), None, 2, 2, *qparams_of),
        "must be odd": lambda: ops.conv2d_quantize(x, torch.ones(4, 2, 3), None, 2, 3, *qparams_of),
        "calibrated for 6": lambda: ops.rotate_quantize(
            x[:, :5], False, torch.ones(6), torch.ones(6, dtype=torch.int32), None, 8
        ),
        "residual": lambda: ops.norm_quantize(
            x, x[:, :5], None, None, 1e-5, True, False, torch.ones(1), torch.ones(1, dtype=torch.int32), None, 8
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call()
