"""B images, L tokens, D channels in, N out; E channels and S states of a scan."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.strategies import bits, integers, layouts, normal, positive_sizes, powers_of_two, seeds, sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq4vm.ops import convolution_1d, linears, quantization, rotation, scans
from ptq4vm.ops import layouts as weight_layouts
from ptq4vm.quantization_specs import IntegerRange
from ptq4vm.quantizers import quantized_decomposed as qd


def bounds(count: int, narrow_range: bool = False) -> tuple[int, int]:
    return IntegerRange(bits=count, narrow_range=narrow_range).bounds


# --- rotation ---

CHANNELS = st.integers(1, 300)


@given(CHANNELS, seeds)
def test_a_rotation_keeps_products_and_is_its_own_inverse(channels, seed):
    x, y = normal(2, 3, channels, seed=seed), normal(2, 3, channels, seed=seed + 1)
    a, b = rotation.rotate(x), rotation.rotate(y)
    assert torch.allclose((a * b).sum(-1), (x * y).sum(-1), atol=1e-4 * channels**0.5)
    assert torch.allclose(rotation.rotate(a), x, atol=1e-5)


@given(st.integers(0, 7), st.sampled_from(range(1, rotation.LARGEST_HARTLEY + 1, 2)))
def test_a_rotation_spreads_one_channel_over_all(power, size):
    channels = size * 2**power
    entries = rotation.rotate(torch.eye(channels)).abs()
    assert entries.min() > 0 and entries.max() <= (2 / channels) ** 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("channels", [17, 2 * 17, 8 * 101])
def test_a_large_odd_factor_is_not_mixed(channels):
    order = channels & -channels
    entries = rotation.rotate(torch.eye(channels)).abs()
    assert torch.allclose(entries.sort().values[:, -order:], torch.full((channels, order), order**-0.5))
    assert entries.ne(0).sum() == channels * order


# --- quantize and dequantize ---


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


# --- qparams ---


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


# --- the integer linear ---


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


# --- the scan ---


def plain_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """The definition, one step after another."""
    delta = delta if delta_bias is None else delta + delta_bias
    delta = F.softplus(delta) if delta_softplus else delta
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for t in range(u.shape[1]):
        step = delta[:, t].unsqueeze(-1)
        h = torch.exp(step * A) * h + step * B[:, t].unsqueeze(1) * u[:, t].unsqueeze(-1)
        y = (h * C[:, t].unsqueeze(1)).sum(-1)
        outputs.append(y if D is None else y + D * u[:, t])
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(u)
    return y if z is None else y * F.silu(z)


def scan_inputs(images, tokens, channels, states, *, D=True, z=True, bias=True, softplus=True, dtype=torch.float32):
    """A realistic scan: decays from almost 1 to almost 0."""
    u, delta = (normal(images, tokens, channels, seed=i, dtype=dtype) for i in (0, 1))
    A = -torch.arange(1, states + 1, dtype=dtype).repeat(channels, 1) * (1 + 0.1 * normal(channels, 1, seed=2)).to(
        dtype
    )
    B, C = (normal(images, tokens, states, seed=i, dtype=dtype) for i in (3, 4))
    return (
        u,
        delta if softplus else 0.1 * delta.abs(),
        A,
        B,
        C,
        normal(channels, seed=5, dtype=dtype) if D else None,
        normal(images, tokens, channels, seed=6, dtype=dtype) if z else None,
        normal(channels, seed=7, dtype=dtype).abs() - 3 * softplus if bias else None,
        softplus,
    )


OPTIONS = [
    {},
    {"D": False},
    {"z": False},
    {"bias": False},
    {"softplus": False},
    {"D": False, "z": False, "bias": False, "softplus": False},
]
SHAPES = [(2, 17, 5, 4), (1, 1, 1, 1), (3, 1, 8, 16), (0, 5, 3, 2), (2, 0, 3, 2), (1, 400, 12, 16), (2, 65, 3, 1)]


def close(ours: Tensor, theirs: Tensor, limit: float) -> bool:
    """Relative to the largest value, as the scan's result is a sum with cancellation."""
    largest = theirs.abs().max().item() if theirs.numel() else 0
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return not theirs.numel() or (ours - theirs).abs().max().item() <= limit * largest


@pytest.fixture(params=[1, 64, 2**19], ids=lambda chunk: f"chunk{chunk}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(scans, "SCAN_CHUNK", request.param)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_scan_is_the_step_by_step_definition(shape, options, chunk):
    inputs = scan_inputs(*shape, **options)
    ours = scans.selective_scan(*inputs)
    assert ours.is_contiguous()
    assert close(ours, plain_scan(*inputs), 1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (1, 400, 12, 16)], ids=str)
def test_the_scans_gradient_is_that_of_the_definition(shape, options, chunk):
    inputs = scan_inputs(*shape, **options, dtype=torch.float64)
    leaves = [value.clone().requires_grad_() for value in inputs[:-1] if value is not None]
    rest = iter(leaves)
    y = plain_scan(*(None if value is None else next(rest) for value in inputs[:-1]), inputs[-1])
    grad = normal(*y.shape, seed=9, dtype=torch.float64)
    theirs = [torch.zeros_like(leaf) for leaf in leaves]  # of no tokens
    if y.requires_grad:
        theirs = torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)
    ours = scans.selective_scan_backward(grad, *inputs)
    assert len(ours) == 8
    present = [value for value, original in zip(ours, inputs[:-1], strict=True) if original is not None]
    absent = [value for value, original in zip(ours, inputs[:-1], strict=True) if original is None]
    assert all(value.numel() == 0 for value in absent)
    names = [
        name
        for name, value in zip(("u", "delta", "A", "B", "C", "D", "z", "bias"), inputs[:-1], strict=True)
        if value is not None
    ]
    wrong = [name for name, a, b in zip(names, present, theirs, strict=True) if not close(a, b, 1e-10)]
    assert not wrong


def test_a_long_scan_has_the_right_gradient_across_chunks(monkeypatch):
    monkeypatch.setattr(scans, "SCAN_CHUNK", 2**10)
    inputs = scan_inputs(1, 400, 3, 4, dtype=torch.float64)
    leaves = [value.clone().requires_grad_() for value in inputs[:-1]]
    y = plain_scan(*leaves, True)
    grad = normal(*y.shape, seed=9, dtype=torch.float64)
    ours = scans.selective_scan_backward(grad, *inputs)
    for a, b in zip(ours, torch.autograd.grad(y, leaves, grad), strict=True):
        assert close(a, b, 1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_size_of_the_chunks_does_not_matter(shape, monkeypatch):
    inputs = scan_inputs(*shape, dtype=torch.float64)
    grad = normal(*inputs[0].shape, seed=9, dtype=torch.float64)
    whole = scans.selective_scan(*inputs), *scans.selective_scan_backward(grad, *inputs)
    monkeypatch.setattr(scans, "SCAN_CHUNK", 3 * max(1, shape[0]) * shape[2] * shape[3])
    pieces = scans.selective_scan(*inputs), *scans.selective_scan_backward(grad, *inputs)
    assert all(close(a, b, 1e-14) for a, b in zip(pieces, whole, strict=True))


@given(layouts)
def test_the_scan_takes_any_layout(layout):
    inputs = scan_inputs(2, 9, 5, 4)
    again = scans.selective_scan(*(layout(value) for value in inputs[:-1]), True)
    assert close(again, scans.selective_scan(*inputs), 1e-6)  # exp is vectorised where it can be


def test_a_half_precision_scan_computes_in_float32():
    inputs = scan_inputs(2, 33, 5, 4)
    halves = [value.bfloat16() for value in inputs[:-1]]
    want = scans.selective_scan(*(value.float() for value in halves), True).bfloat16()
    assert torch.equal(scans.selective_scan(*halves, True), want)


# --- the convolution ---


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    taps, channels = weight.shape[1], weight.shape[0]
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=taps - 1, groups=channels)
    y = y[..., : x.shape[1]].transpose(1, 2)
    return F.silu(y) if silu else y


CONV_SHAPES = [(2, 17, 5, 4), (1, 1, 3, 4), (2, 2, 1, 4), (2, 3, 4, 1), (3, 50, 8, 3)]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_the_convolution_is_torchs(shape, has_bias, silu):
    images, tokens, channels, taps = shape
    x, weight = integers(-8, 7, images, tokens, channels).float(), integers(-8, 7, channels, taps, seed=1).float()
    bias = integers(-8, 7, channels, seed=2).float() if has_bias else None
    # whole numbers have exact sums in any order; silu of equal numbers is equal up to its vectorised form
    assert torch.equal(convolution_1d.causal_conv1d(x, weight, bias, False), plain_conv(x, weight, bias, False))
    ours, theirs = (conv(x / 8, weight / 8, bias, silu) for conv in (convolution_1d.causal_conv1d, plain_conv))
    assert ours.is_contiguous()
    assert close(ours, theirs.contiguous(), 1e-6)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_the_convolutions_gradient_is_torchs(shape, has_bias, silu):
    images, tokens, channels, taps = shape
    x, weight = (
        normal(images, tokens, channels, dtype=torch.float64),
        normal(channels, taps, seed=1, dtype=torch.float64),
    )
    bias = normal(channels, seed=2, dtype=torch.float64) if has_bias else None
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias) if value is not None]
    y = plain_conv(*leaves, *(() if has_bias else (None,)), silu)
    grad = normal(*y.shape, seed=3, dtype=torch.float64)
    ours = convolution_1d.causal_conv1d_backward(grad, x, weight, bias, silu)
    theirs = torch.autograd.grad(y, leaves, grad)
    assert all(close(a, b, 1e-12) for a, b in zip(ours, theirs, strict=False))
    assert has_bias or ours[2].numel() == 0


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4)], ids=str)
def test_an_empty_convolution_is_empty(shape):
    images, tokens, channels, taps = shape
    x, weight = normal(images, tokens, channels), normal(channels, taps)
    assert convolution_1d.causal_conv1d(x, weight, None, True).shape == x.shape
    grads = convolution_1d.causal_conv1d_backward(x, x, weight, None, True)
    assert grads[0].shape == x.shape and torch.equal(grads[1], torch.zeros_like(weight))


@given(st.integers(0, 16), layouts)
def test_no_token_sees_a_later_one(place, layout):
    x, weight = normal(2, 17, 5), normal(5, 4, seed=1)
    changed = x.clone()
    changed[:, place:] += 1
    before, after = (convolution_1d.causal_conv1d(layout(value), weight, None, True) for value in (x, changed))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])
