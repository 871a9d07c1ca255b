"""fake_quantize on every instruction set here: what the formulas of autograd give, forwards to the last bit."""

import pytest
import torch
from helpers.draws import (
    CHANNELS,
    KINDS,
    ROWS,
    SUPPRESSED,
    assert_threads_change_no_bit,
    available,
    draw,
    needs_library,
    qparams,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.backend import native
from ptq4vm.ops import fake_quantization


@pytest.fixture(params=available() or ["reference"])
def isa(request):
    """Runs the test on one instruction set, or on the reference where there is no library."""
    if native.unavailable_reason() is not None:
        yield request.param
        return
    before = native.isa()
    assert torch.ops.ptq4vm._use_isa(request.param) == request.param
    yield request.param
    torch.ops.ptq4vm._use_isa(before)


def composed(x, scale, zero_point, smooth, bits):
    """The composition of torch's operators whose gradient is meant."""
    v = x if smooth is None else x * smooth
    scale, half = scale.unsqueeze(-1), 2 ** (bits - 1)
    if zero_point is None:
        v, low, high = v / scale, 1 - half, half - 1
    else:
        zero_point = zero_point.unsqueeze(-1)
        v, low, high = v * (1.0 / scale), -half - zero_point, half - 1 - zero_point
    codes = v.detach().round()
    clamped = torch.where(codes < low, low, torch.where(codes > high, high, codes))  # clamp halves gradients at ties
    return (clamped + (v - v.detach()) * (codes == clamped)) * scale


def inputs(kind, images, tokens, channels, bits, smooth, seed):
    """x with values that are clamped, and values exactly between two codes where the scale is one; its qparams."""
    random = draw(seed)
    if kind == "weight":
        x, (scale, zero_point) = torch.randn(tokens, channels, generator=random), qparams("token", 1, tokens, 8, random)
        zero_point = None
    else:
        x = torch.randn(images, tokens, channels, generator=random)
        scale, zero_point = qparams(kind, images, tokens, bits, random)
    x = torch.where(torch.rand(x.shape, generator=random) < 0.3, torch.round(x) + 0.5, x) * 10.0 ** (seed % 5 - 1)
    if seed % 3 == 0:
        scale = torch.ones_like(scale)
    return x, scale, zero_point, torch.rand(channels, generator=random) + 0.5 if smooth else None, bits


WAYS = st.sampled_from(["weight", "tensor", "token", "image"])


@given(WAYS, st.integers(0, 3), ROWS, CHANNELS, st.integers(2, 8), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_values_are_to_the_last_bit_those_of_the_formulas(isa, kind, images, tokens, channels, bits, smooth, seed):
    arguments = inputs(kind, images, tokens, channels, bits, smooth, seed)
    assert torch.equal(ops.fake_quantize(*arguments), composed(*arguments))
    assert torch.equal(fake_quantization.fake_quantize(*arguments), composed(*arguments))


@given(WAYS, st.integers(0, 3), ROWS, CHANNELS, st.integers(2, 8), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_gradients_are_those_of_autograd(isa, kind, images, tokens, channels, bits, smooth, seed):
    x, scale, zero_point, factor, _ = inputs(kind, images, tokens, channels, bits, smooth, seed)
    zero_point = None if zero_point is None else zero_point.float()
    leaves = [value.requires_grad_() for value in (x, scale, zero_point, factor) if value is not None]
    grad = torch.randn(x.shape, generator=draw(seed + 1))
    want = torch.autograd.grad(composed(x, scale, zero_point, factor, bits), leaves, grad)
    have = torch.autograd.grad(ops.fake_quantize(x, scale, zero_point, factor, bits), leaves, grad)
    # sums cancel: the unit is what they would be if they did not
    code = 2**bits * grad.abs()
    units = [grad.abs().amax() if grad.numel() else 0, code.sum(-1).sum_to_size(scale.shape)]
    if zero_point is not None:
        units.append((scale.unsqueeze(-1) * grad.abs()).sum(-1).sum_to_size(scale.shape))
    if factor is not None:
        units[0] = units[0] * factor.max()
        units.append((grad * x).abs().flatten(0, -2).sum(0))
    for ours, theirs, unit in zip(have, want, units, strict=True):
        assert ours.shape == theirs.shape and ((ours - theirs).abs() <= 1e-5 * unit).all()


@given(WAYS, st.booleans(), st.tuples(*[st.booleans()] * 4), st.integers(0, 2**20))
@settings(max_examples=30, suppress_health_check=SUPPRESSED)
def test_what_nobody_needs_is_not_computed_and_changes_nothing_else(isa, kind, smooth, needs, seed):
    arguments = inputs(kind, 2, 5, 33, 4, smooth, seed)
    affine = kind != "weight"
    needs = (*needs[:2], needs[2] and affine, needs[3] and smooth)
    grad = torch.randn(arguments[0].shape, generator=draw(seed))
    every = torch.ops.ptq4vm.fake_quantize_backward(grad, *arguments, True, True, affine, smooth)
    some = torch.ops.ptq4vm.fake_quantize_backward(grad, *arguments, *needs)
    for one, all_of_it, needed in zip(some, every, needs, strict=True):
        assert torch.equal(one, all_of_it) if needed else one.numel() == 0


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("kind", ["weight", "tensor", "token", "image"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 1), (0, 3, 5), (2, 0, 5), (3, 7, 9)], ids=str)
def test_it_obeys_torchs_rules(shape, kind, smooth):
    x, scale, zero_point, factor, bits = inputs(kind, *shape, 4, smooth, 1)
    leaves = [None if value is None else value.clone().requires_grad_() for value in (x, scale, factor)]
    torch.library.opcheck(ops.fake_quantize.default, (leaves[0], leaves[1], zero_point, leaves[2], bits))
    backward = torch.ops.ptq4vm.fake_quantize_backward.default
    for needs in ((True, True, kind != "weight", smooth), (False, True, False, False)):
        torch.library.opcheck(backward, (torch.randn_like(x), x, scale, zero_point, factor, bits, *needs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_computed_in_float32(isa, dtype):
    x, *rest = inputs("token", 2, 7, 33, 8, True, 1)
    x, grad = x.to(dtype), torch.randn(x.shape, generator=draw(2)).to(dtype)
    assert torch.equal(ops.fake_quantize(x, *rest), ops.fake_quantize(x.float(), *rest).to(dtype))
    backward = torch.ops.ptq4vm.fake_quantize_backward
    ours = backward(grad, x, *rest, True, True, True, True)
    theirs = backward(grad.float(), x.float(), *rest, True, True, True, True)
    assert torch.equal(ours[0], theirs[0].to(dtype))
    assert all(map(torch.equal, ours[1:], theirs[1:]))


def test_any_layout_is_read(isa):
    x, *rest = inputs("token", 3, 17, 33, 4, True, 1)
    spread = torch.stack((x, torch.zeros_like(x)), -1)[..., 0]
    assert not spread.is_contiguous()
    assert torch.equal(ops.fake_quantize(spread, *rest), ops.fake_quantize(x, *rest))
    ours, theirs = (
        torch.ops.ptq4vm.fake_quantize_backward(value, value, *rest, True, True, True, True) for value in (spread, x)
    )
    assert all(map(torch.equal, ours, theirs))


def test_values_that_are_not_finite_stay_where_they_are(isa):
    """Infinities are clamped; NaN stays NaN, and passes no gradient on."""
    x = torch.tensor([[[float("inf"), -float("inf"), float("nan"), 1.0]]]).repeat(1, 1, 9).requires_grad_()
    y = ops.fake_quantize(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, 4)
    assert torch.equal(y.view(9, 4)[:, [0, 1, 3]], torch.tensor([7.0, -8.0, 1.0]).expand(9, 3))
    assert y.view(9, 4)[:, 2].isnan().all()
    y.nansum().backward()
    assert torch.equal(x.grad.view(9, 4), torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(9, 4))


@needs_library
@given(KINDS, st.integers(0, 2**20))
@settings(max_examples=10, suppress_health_check=SUPPRESSED)
def test_the_number_of_threads_changes_no_bit(isa, kind, seed):
    arguments = inputs(kind, 3, 197, 200, 4, True, seed)
    grad = torch.randn(arguments[0].shape, generator=draw(seed))

    def everything():
        backward = torch.ops.ptq4vm.fake_quantize_backward(grad, *arguments, True, True, True, True)
        return ops.fake_quantize(*arguments), *backward

    assert_threads_change_no_bit(everything)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.ones(4)}, "token scales were calibrated for 4 tokens, the input has 5"),
        ({3: torch.ones(4)}, "smooth"),
        ({4: 9}, "bits must be between 2 and 8, got 9"),
    ],
)
@needs_library
def test_what_does_not_fit_is_an_error(change, message):
    arguments = list(inputs("token", 2, 5, 3, 4, True, 1))
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.fake_quantize(*arguments)
