"""Laws of every operator on a GPU: drawn arguments, and the reference's results.

tests/emulated/test_glue.py holds the emulated kernels to these laws, and tests/gpu/test_operators.py those of a real
GPU. A law is given the operators by name, which take tensors of the CPU and return some, and what its strategies drew.
"""

import torch
from hypothesis import strategies as st

from helpers import gate_laws  # noqa: F401  registers its law
from helpers.draws import (
    assert_same_codes,
    directional_inputs,
    directional_qparams,
    draw,
    exact_directional,
    linear_inputs,
    part,
    qparams,
    relative,
    rows_of_more,
    scan_inputs,
)
from helpers.laws import (
    BITS,
    CHANNELS,
    DTYPES,
    FEATURES,
    FLAG,
    IMAGES,
    KINDS,
    LAWS,
    SEEDS,
    TOKENS,
    WEIGHT_BITS,
    Law,
    law,
    tolerance,
)
from ptq4vm.ops import convolution_1d, convolution_2d, fake_quantization, layouts, linears, quantization, rotation
from ptq4vm.ops import norms as norm_ops
from ptq4vm.ops import scans as scan_ops

# --- producers ---


@law(
    "quantize", "dequantize", "choose_qparams",
    dtype=DTYPES, images=IMAGES, tokens=TOKENS, channels=CHANNELS, bits=BITS, kind=KINDS, smooth=FLAG, strided=FLAG,
    seed=SEEDS,
)  # fmt: skip
def codes_and_what_they_stand_for(gpu, dtype, images, tokens, channels, bits, kind, smooth, strided, seed):
    random = draw(seed)
    x = (torch.randn(images, tokens, channels, generator=random) * 40).to(dtype)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    ours = gpu.quantize(rows_of_more(x, strided), 1 / scale, zero_point, inv_smooth, bits)
    assert torch.equal(ours, quantization.quantize(x, 1 / scale, zero_point, inv_smooth, bits))
    assert torch.equal(gpu.dequantize(ours, scale, zero_point), quantization.dequantize(ours, scale, zero_point))
    chosen = gpu.choose_qparams(rows_of_more(x, strided), inv_smooth, bits)
    assert all(map(torch.equal, chosen, quantization.choose_qparams(x, inv_smooth, bits)))


@law(
    "rotate", "rotate_quantize",
    dtype=DTYPES, images=IMAGES, tokens=TOKENS, channels=CHANNELS, gelu=FLAG, strided=FLAG, seed=SEEDS,
)  # fmt: skip
def rotations(gpu, dtype, images, tokens, channels, gelu, strided, seed):
    random = draw(seed)
    x = torch.randn(images, tokens, channels, generator=random).to(dtype)
    y = gpu.rotate(rows_of_more(x, strided))
    assert y.dtype is dtype
    limit = tolerance(dtype)
    assert torch.allclose(y, rotation.rotate(x), rtol=limit, atol=limit * channels**0.5)
    scale, zero_point = qparams("token", images, tokens, 8, random)
    arguments = (gelu, 20 / scale, zero_point, None, 8)
    assert_same_codes(
        gpu.rotate_quantize(rows_of_more(x, strided), *arguments), rotation.rotate_quantize(x, *arguments)
    )


@law(
    "norm_quantize",
    dtype=DTYPES, images=IMAGES, tokens=TOKENS, channels=CHANNELS, bits=BITS, kind=KINDS, rms=FLAG, add=FLAG,
    rotated=FLAG, optional=st.integers(0, 7), seed=SEEDS,
)  # fmt: skip
def norms(gpu, dtype, images, tokens, channels, bits, kind, rms, add, rotated, optional, seed):
    random = draw(seed)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    scale = scale * 2 ** (8 - bits) / 20

    def normal(*shape):
        return torch.randn(shape, generator=random)

    x = normal(images, tokens, channels).to(dtype)
    residual = rows_of_more(normal(images, tokens, channels), True) if add else None
    weight = normal(channels) if optional & 1 else None
    bias = normal(channels) if optional & 2 and not rms else None
    inv_smooth = torch.rand(channels, generator=random) if optional & 4 else None
    arguments = (x, residual, weight, bias, 1e-5, rms, rotated, 1 / scale, zero_point, inv_smooth, bits)
    total, codes = gpu.norm_quantize(*arguments)
    want, want_codes = norm_ops.norm_quantize(*arguments)
    assert torch.equal(total, want) and total.dtype is torch.float32
    assert_same_codes(codes, want_codes)


@law(
    "conv1d_quantize", "causal_conv1d",
    dtype=DTYPES, K=st.integers(1, 3), images=IMAGES, tokens=TOKENS, channels=CHANNELS, taps=st.sampled_from([1, 3, 4]),
    bias=FLAG, per_token=FLAG, strided=FLAG, bits=st.integers(4, 8), seed=SEEDS,
)  # fmt: skip
def causal_convolutions(gpu, dtype, K, images, tokens, channels, taps, bias, per_token, strided, bits, seed):
    random = draw(seed)
    x = torch.randn(images, tokens, channels, generator=random).to(dtype)
    weight = torch.randn(K, channels, taps, generator=random)
    bias = torch.randn(K, channels, generator=random) if bias else None
    order = torch.stack([torch.randperm(tokens, generator=random) for _ in range(K)]).int()
    scale, zero_point = directional_qparams(K, tokens, per_token, bits, random)
    inv_smooth = torch.rand(K, channels, generator=random) + 0.5 if per_token else None
    rest = (weight, bias, order, 100 / scale, zero_point, inv_smooth, bits)
    (u, codes), (want, want_codes) = (
        gpu.conv1d_quantize(rows_of_more(x, strided), *rest),
        convolution_1d.conv1d_quantize(x, *rest),
    )
    assert u.dtype is dtype and relative(u.float(), want.double()) <= tolerance(dtype)
    assert_same_codes(codes, want_codes)
    plain = (weight[0], None if bias is None else bias[0], strided)
    y = gpu.causal_conv1d(rows_of_more(x, strided), *plain)
    assert y.dtype is dtype and relative(y.float(), convolution_1d.causal_conv1d(x.double(), *plain)) <= tolerance(
        dtype
    )


@law(
    "conv2d_quantize",
    dtype=DTYPES, K=st.integers(1, 4), images=IMAGES, height=st.integers(1, 5), width=st.integers(1, 5),
    channels=CHANNELS, rows=st.sampled_from([1, 3]), columns=st.sampled_from([1, 3]), strided=FLAG, seed=SEEDS,
)  # fmt: skip
def convolutions_of_maps(gpu, dtype, K, images, height, width, channels, rows, columns, strided, seed):
    random = draw(seed)
    x = torch.randn(images, height * width, channels, generator=random).to(dtype)
    weight, bias = torch.randn(channels, rows, columns, generator=random), torch.randn(channels, generator=random)
    scale, zero_point = directional_qparams(K, height * width, strided, 8, random)
    rest = (weight, bias, height, width, 100 / scale, zero_point, None, 8)
    (u, codes), (want, want_codes) = (
        gpu.conv2d_quantize(rows_of_more(x, strided), *rest),
        convolution_2d.conv2d_quantize(x, *rest),
    )
    assert u.dtype is dtype and relative(u.float(), want.double()) <= tolerance(dtype)
    assert_same_codes(codes, want_codes)


# --- scans ---


@law(
    "selective_scan",
    dtype=DTYPES, images=IMAGES, tokens=TOKENS, channels=CHANNELS, states=st.sampled_from([1, 3, 16]), optional=FLAG,
    seed=SEEDS,
)  # fmt: skip
def scans(gpu, dtype, images, tokens, channels, states, optional, seed):
    random = draw(seed)
    u, delta, A, B, C, D, z, bias = scan_inputs(images, tokens, channels, states, optional, random)
    u, delta, B, C, z = (None if x is None else part(x, dtype, random) for x in (u, delta, B, C, z))
    inputs = (u, delta, A, B, C, D, z, bias)
    exact = scan_ops.selective_scan(*(None if x is None else x.double() for x in inputs), True)
    ours = gpu.selective_scan(*inputs, True)
    assert ours.dtype is dtype and ours.is_contiguous() and relative(ours.float(), exact) <= tolerance(dtype)


@law(
    "selective_scan_quantized",
    images=IMAGES, tokens=TOKENS, channels=CHANNELS, states=st.sampled_from([1, 3, 16]), per_token=FLAG, seed=SEEDS,
)  # fmt: skip
def quantized_scans(gpu, images, tokens, channels, states, per_token, seed):
    """Without decay, and of values so short that no sum is rounded: the same bits."""
    random = draw(seed)

    def quarters(*shape):
        return torch.randint(-16, 17, shape, generator=random) / 4

    u, delta = quarters(images, tokens, channels), quarters(images, tokens, channels).abs()
    B, C, D = quarters(images, tokens, states), quarters(images, tokens, states), quarters(channels)
    scale = 2.0 ** torch.randint(-2, 3, (tokens if per_token else 1,), generator=random)
    inputs = (u, delta, torch.zeros(channels, states), B, C, D, None, None, False, scale, 1 / scale, 8)
    assert torch.equal(gpu.selective_scan_quantized(*inputs), scan_ops.selective_scan_quantized(*inputs))


@law(
    "directional_scan", "directional_scan_quantize",
    dtype=DTYPES, K=st.integers(1, 4), shared=FLAG, images=IMAGES, tokens=st.sampled_from([1, 2, 17, 300]),
    channels=CHANNELS, rank=st.sampled_from([1, 3, 24, 70]), states=st.sampled_from([1, 3, 16]), optional=FLAG,
    bits=WEIGHT_BITS, padding=st.integers(0, 3), merge=FLAG, seed=SEEDS,
)  # fmt: skip
def directional_scans(gpu, dtype, merge, seed, **sizes):
    random = draw(seed)
    inputs = directional_inputs(random, **sizes, dtype=dtype)
    ours = gpu.directional_scan(*inputs, merge, 0.5)
    assert ours.dtype is dtype and relative(ours.float(), exact_directional(inputs, merge, 0.5)) <= tolerance(dtype)
    tokens, channels = inputs[0].shape[2:]
    zero_point = torch.randint(-2, 2, (tokens,), generator=random, dtype=torch.int32)
    smooth = torch.rand(channels, generator=random) if merge else None
    codes_of = (torch.rand(tokens, generator=random) * 30, zero_point, smooth, 8)
    y = gpu.directional_scan(inputs[0].float(), *inputs[1:], True, 0.5)
    assert torch.equal(gpu.directional_scan_quantize(*inputs, 0.5, *codes_of), quantization.quantize(y, *codes_of))


# --- linears ---


def in_rows(arguments, bits):
    """The weight as a model that was fused on a GPU has it."""
    x, scale, zero_point, packed, *rest = arguments
    codes = layouts.unpack_weight(packed, rest[1].shape[-1], x.shape[-1])
    return x, scale, zero_point, layouts.pad_weight(codes, bits), *rest


@law(
    "linear_packed",
    stack=st.sampled_from([None, None, 1, 3]), images=IMAGES, tokens=TOKENS, channels=CHANNELS, features=FEATURES,
    bits=WEIGHT_BITS, kind=KINDS, bias=FLAG, dtype=DTYPES | st.just(torch.float64), seed=SEEDS,
)  # fmt: skip
def linears_in_every_layout(gpu, stack, images, tokens, channels, features, bits, kind, bias, dtype, seed):
    arguments = linear_inputs(stack, images, tokens, channels, features, bits, kind, bias, draw(seed))
    want = linears.linear_packed(*arguments, dtype)
    for layout in (arguments, in_rows(arguments, bits), in_rows(arguments, 8)):
        assert torch.equal(gpu.linear_packed(*layout, dtype), want)
        x, *rest = layout
        x = torch.cat((x[..., :1], x), -1)[..., 1:]  # neither contiguous nor aligned
        assert torch.equal(gpu.linear_packed(x, *rest, dtype), want)


@law("linear_packed", bias=FLAG, seed=SEEDS)
def weights_of_four_bits_take_inputs_of_eight(gpu, bias, seed):
    """But in rows of nibbles, which say that the inputs have four bits too."""
    random = draw(seed)
    _, *rest = arguments = linear_inputs(None, 2, 17, 33, 44, 4, "token", bias, random)
    x = torch.randint(-128, 128, (2, 17, 33), generator=random, dtype=torch.int8)
    want = linears.linear_packed(x, *rest, torch.float32)
    for _, *layout in (arguments, in_rows(arguments, 8)):
        assert torch.equal(gpu.linear_packed(x, *layout, torch.float32), want)


@law(
    "linear",
    images=IMAGES, tokens=TOKENS, channels=CHANNELS, features=FEATURES, bits=WEIGHT_BITS, kind=KINDS, bias=FLAG,
    dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
def plain_weights(gpu, images, tokens, channels, features, bits, kind, bias, dtype, seed):
    x, scale, zero_point, packed, _, *rest = linear_inputs(
        None, images, tokens, channels, features, bits, kind, bias, draw(seed)
    )
    codes = layouts.unpack_weight(packed, features, channels)
    weight = layouts.pack_int4(codes) if bits == 4 else codes.t().contiguous().t()
    arguments = (x, scale, zero_point, weight, *rest, dtype)
    assert torch.equal(gpu.linear(*arguments), linears.linear(*arguments))


@law("linear", "linear_packed", codes=st.sampled_from([(-128, -127, 127), (127, 127, -128), (127, -127, -128)]))
def the_largest_accumulators_are_exact(gpu, codes):
    """All at their ends, the zero point too: nothing saturates on the way."""
    code, w, z = codes
    x, weight = torch.full((1, 33, 3072), code, dtype=torch.int8), torch.full((40, 3072), w, dtype=torch.int8)
    one, zero_point, scale = torch.ones(1), torch.full((1,), z, dtype=torch.int32), torch.ones(40)
    sums = weight.sum(-1, dtype=torch.int32)
    for y in (
        gpu.linear(x, one, zero_point, weight, scale, None, torch.float32),
        gpu.linear_packed(x, one, zero_point, layouts.pad_weight(weight, 8), sums, scale, None, torch.float32),
    ):
        assert torch.equal(y, torch.full_like(y, 3072.0 * (code - z) * w))


@law(
    "linear_gelu_quantize",
    images=IMAGES, tokens=TOKENS, channels=CHANNELS, features=FEATURES, bits=WEIGHT_BITS, kind=KINDS, smooth=FLAG,
    rotated=FLAG, new_bits=BITS, seed=SEEDS,
)  # fmt: skip
def codes_of_gelus(gpu, images, tokens, channels, features, bits, kind, smooth, rotated, new_bits, seed):
    random = draw(seed)
    arguments = linear_inputs(None, images, tokens, channels, features, bits, "token", True, random)
    x, scale, *rest = arguments
    arguments = x, scale / channels / 2**bits, *rest
    new_scale, zero_point = qparams(kind, images, tokens, new_bits, random)
    inv_smooth = torch.rand(features, generator=random) if smooth else None
    new = (rotated, 1 / new_scale, zero_point, inv_smooth, new_bits)
    want = linears.linear_gelu_quantize(*arguments, *new)
    for layout in (arguments, in_rows(arguments, bits)):
        assert_same_codes(gpu.linear_gelu_quantize(*layout, *new), want)


# --- gradients, which run the reference where they have no kernel ---


@law(
    "selective_scan_backward", "causal_conv1d_backward",
    images=IMAGES, tokens=TOKENS, channels=CHANNELS, states=st.sampled_from([1, 3, 16]), optional=FLAG, seed=SEEDS,
)  # fmt: skip
def gradients(gpu, images, tokens, channels, states, optional, seed):
    random = draw(seed)
    inputs = scan_inputs(images, tokens, channels, states, optional, random)
    grad = torch.randn(images, tokens, channels, generator=random)
    exact = tuple(None if value is None else value.double() for value in inputs)
    ours = gpu.selective_scan_backward(grad, *inputs, True)
    theirs = scan_ops.selective_scan_backward(grad.double(), *exact, True)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) <= 2e-5
    weight, bias = torch.randn(channels, 4, generator=random), inputs[5]
    ours = gpu.causal_conv1d_backward(grad, inputs[0], weight, bias, True)
    theirs = convolution_1d.causal_conv1d_backward(grad.double(), exact[0], weight.double(), exact[5], True)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) <= 2e-5


@law(
    "fake_quantize", "fake_quantize_backward",
    images=IMAGES, tokens=TOKENS, channels=CHANNELS, bits=BITS, per_token=FLAG, affine=FLAG, smooth=FLAG, seed=SEEDS,
)  # fmt: skip
def simulated_codes_and_their_gradients(gpu, images, tokens, channels, bits, per_token, affine, smooth, seed):
    random = draw(seed)
    x, grad = torch.randn(2, images, tokens, channels, generator=random)
    scale, zero_point = qparams("token" if per_token else "tensor", images, tokens, bits, random)
    smoothing = torch.rand(channels, generator=random) + 0.5 if smooth else None
    arguments = (x, scale, zero_point.float() if affine else None, smoothing, bits)
    assert torch.equal(gpu.fake_quantize(*arguments), fake_quantization.fake_quantize(*arguments))
    needs = (True, True, affine, smooth)
    ours = gpu.fake_quantize_backward(grad, *arguments, *needs)
    theirs = fake_quantization.fake_quantize_backward(grad, *arguments, *needs)
    assert all(a.shape == b.shape and relative(a, b.double()) <= 2e-5 for a, b in zip(ours, theirs, strict=True))


WITHOUT_CUDA = {
    "selective_scan_backward", "causal_conv1d_backward", "selective_scan_quantized",
    "fake_quantize", "fake_quantize_backward",
}  # fmt: skip
"""Operators that the library for GPUs leaves to the references: gradients, and what learning or measuring simulates."""


def name_of(schema: str) -> str:
    return schema.split("(", 1)[0]


def laws_of(operators) -> dict[str, Law]:
    """Returns the laws that ask for no other operators than these."""
    return {name: law for name, law in LAWS.items() if law.operators <= set(operators)}
