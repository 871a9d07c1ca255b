"""x (B, L, D), W (N, D)."""

import pytest
import torch
from helpers.strategies import bits, integers, normal, positive_sizes, powers_of_two, seeds
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.ops import fake_quantization, quantization
from ptq4vm.quantization_specs import Granularity, IntegerRange
from ptq4vm.quantizers import ActivationFakeQuantize, Mode, WeightFakeQuantize

STATIC = [Granularity.PER_TOKEN, Granularity.PER_TENSOR]


def activation(count: int, granularity: Granularity, tokens: int, seed: int = 0) -> ActivationFakeQuantize:
    fake = ActivationFakeQuantize(IntegerRange(bits=count, narrow_range=False), granularity)
    fake.mode = Mode.QUANTIZE
    if not fake.dynamic:
        size = tokens if granularity is Granularity.PER_TOKEN else 1
        zero_point = integers(*fake.spec.bounds, size, seed=seed).int()
        fake.set_qparams(normal(size, seed=seed).exp() / 4, zero_point)
    return fake


def weight(count: int, outputs: int, seed: int = 0) -> WeightFakeQuantize:
    fake = WeightFakeQuantize(IntegerRange(bits=count, narrow_range=True))
    fake.mode, fake.scale = Mode.QUANTIZE, normal(outputs, seed=seed).exp() / 4
    return fake


@pytest.mark.parametrize("granularity", Granularity)
@given(count=bits, tokens=positive_sizes, channels=positive_sizes, seed=seeds)
def test_inputs_are_what_the_reference_gives(granularity, count, tokens, channels, seed):
    x = normal(2, tokens, channels, seed=seed)
    fake = activation(count, granularity, tokens, seed)
    pair = quantization.choose_qparams(x, None, count) if fake.dynamic else fake.calculate_qparams()
    codes = quantization.quantize(x, 1 / pair[0], pair[1], None, count)
    assert torch.equal(fake(x), quantization.dequantize(codes, *pair))


@given(bits, positive_sizes, positive_sizes, seeds)
def test_weights_are_what_the_reference_gives(count, outputs, channels, seed):
    w, fake = normal(outputs, channels, seed=seed), weight(count, outputs, seed)
    codes = quantization.quantize_weight(w, fake.scale, count)
    assert torch.equal(fake(w), codes * fake.scale.view(-1, 1))


def test_until_it_is_calibrated_a_tensor_passes():
    x = normal(2, 3, 4)
    fake = ActivationFakeQuantize(IntegerRange(bits=4, narrow_range=False), Granularity.PER_TOKEN)
    assert fake(x) is x
    assert WeightFakeQuantize(IntegerRange(bits=4, narrow_range=True))(x) is x


@pytest.mark.parametrize("granularity", STATIC)
def test_values_in_range_pass_their_gradient_and_clamped_ones_do_not(granularity):
    fake = activation(4, granularity, 3)
    fake.set_qparams(torch.ones_like(fake.scale), torch.zeros_like(fake.zero_point))
    x = torch.tensor([[[-20.0, -7.3, 0.2, 6.9, 20.0]] * 3], requires_grad=True)
    fake(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]).expand(1, 3, 5))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_weight_that_rounds_to_the_last_code_still_passes_its_gradient(count):
    fake = weight(count, 1)
    fake.scale, last = torch.ones(1), 2.0 ** (count - 1) - 1
    w = torch.tensor([[-last - 9, -last - 0.1, -last, 0.2, last, last + 0.1, last + 9]], requires_grad=True)
    fake(w).sum().backward()
    assert w.grad.tolist() == [[0, 1, 1, 1, 1, 1, 0]]


def test_the_gradient_of_a_scale_is_that_of_lsq():
    """d(round(x / s) · s)/ds is round(x / s) - x / s in range and the code itself outside (Esser et al. 2020)."""
    fake = activation(4, Granularity.PER_TENSOR, 1)
    fake.set_qparams(torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32))
    log_factor = fake.start_learning()
    x = torch.tensor([[[-20.0, -1.4, 0.3, 2.1, 20.0]]])
    fake(x).sum().backward()
    v = x / 0.5
    slope = torch.where(v < -9, -9.0, torch.where(v > 6, 6.0, v.round() - v))
    assert torch.allclose(log_factor.grad, 0.5 * slope.sum().view(1), atol=1e-6)


@pytest.mark.parametrize("make", [lambda: activation(4, Granularity.PER_TOKEN, 3), lambda: weight(4, 3)])
def test_learning_starts_where_it_was_and_ends_folded_in(make):
    fake, x = make(), normal(3, 5) if isinstance(make(), WeightFakeQuantize) else normal(2, 3, 5)
    before, scale = fake(x), fake.scale.clone()
    log_factor = fake.start_learning()
    assert torch.equal(fake(x), before)
    with torch.no_grad():
        log_factor.add_(0.3)
    learned = fake(x).detach()
    fake.fold_learned_scale()
    assert fake.log_factor is None and not fake.scale.requires_grad
    assert torch.equal(fake(x), learned)
    assert torch.equal(fake.scale, scale * torch.exp(torch.full((3,), 0.3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantized_in_float32_and_stays_half(dtype):
    x = normal(2, 3, 5).to(dtype)
    fake = activation(8, Granularity.PER_TOKEN, 3)
    assert torch.equal(fake(x), fake(x.float()).to(dtype))


def straight_through(x, scale, zero_point, smooth, count):
    """The definition, for autograd: rounding has the gradient of the identity, and codes out of range are the last."""
    v = x * smooth / scale.unsqueeze(-1)
    codes = v.detach().round()
    low, high = fake_bounds(count, zero_point)
    zero = 0 if zero_point is None else zero_point.unsqueeze(-1)
    kept = (codes + (v - v.detach())) + zero
    kept = torch.where(codes + zero < low, low, torch.where(codes + zero > high, high, kept))
    return (kept - zero) * scale.unsqueeze(-1)


def fake_bounds(count, zero_point):
    return IntegerRange(bits=count, narrow_range=zero_point is None).bounds


@given(bits, positive_sizes, positive_sizes, st.booleans(), seeds)
def test_the_reference_gradient_is_that_of_the_definition(count, tokens, channels, affine, seed):
    """Sums of eighths, powers of two and whole numbers are exact; a third of the codes is out of range."""
    scale, smooth = (powers_of_two(size, seed=seed + i, low=-2, high=2) for i, size in enumerate((tokens, channels)))
    half = 2 ** (count - 1)
    codes = integers(-120, 120, 2, tokens, channels, seed=seed + 2).float() * max(1, half // 64) / 8 * min(1, half / 4)
    x = codes * scale.unsqueeze(-1) / smooth
    zero = integers(-half, half - 1, tokens, seed=seed + 3).float() if affine else None
    grad = integers(-2, 2, 2, tokens, channels, seed=seed + 4).float()
    leaves = [value.clone().requires_grad_() for value in (x, scale, smooth, *([zero] if affine else []))]
    straight_through(leaves[0], leaves[1], leaves[3] if affine else None, leaves[2], count).backward(grad)
    whole = zero.int() if affine else None
    needs = (True, True, affine, True)
    found = fake_quantization.fake_quantize_backward(grad, x, scale, whole, smooth, count, *needs)
    assert torch.equal(found[0], leaves[0].grad)
    for value, want in ((found[1], leaves[1].grad), (found[3], leaves[2].grad), (found[2], affine and leaves[3].grad)):
        assert want is False or torch.equal(value, want)


def test_the_token_that_stays_in_floating_point_is_smoothed_as_the_others_are():
    fake = ActivationFakeQuantize(IntegerRange(bits=4, narrow_range=False), Granularity.PER_TOKEN, float_token_index=1)
    fake.set_qparams(torch.tensor([0.5, 0.25, 1.0]), torch.zeros(3, dtype=torch.int32))
    fake.mode = Mode.QUANTIZE
    x, smooth = normal(2, 3, 4), torch.tensor([0.5, 2.0, 4.0, 1.0])
    y, wanted = fake(x, smooth), fake(x * smooth)
    assert torch.equal(y[:, 1], x[:, 1] * smooth) and torch.equal(y, wanted)
