"""x, x̂ (images, L, D), W (N, D)."""

import dataclasses

import pytest
import torch
from helpers.small_models import BEST, blocks
from helpers.strategies import bits, normal, positive_sizes, seeds
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm import Learning, QuantConfig, calibrate, convert, ops, prepare
from ptq4vm.graph.insert import attribute
from ptq4vm.metadata import metadata_of
from ptq4vm.ops import layouts, quantization
from ptq4vm.passes.calibrate.gptq import RIDGES, Moments, best_ridge, compensated_weight, gptq_codes
from ptq4vm.passes.quantized_nodes import quantized_linears, weight_of
from ptq4vm.quantization_specs import IntegerRange
from ptq4vm.quantizers import Mode, WeightFakeQuantize
from ptq4vm.quantizers.range_search import weight_scale


def moments_of(x, seen) -> Moments:
    moments = Moments(x.shape[-1])
    moments.add(x, seen)
    return moments


def spec(count: int) -> IntegerRange:
    return IntegerRange(bits=count, narrow_range=True)


def step_of(weight, count: int):
    return weight_scale(weight, spec(count), QuantConfig().range_search)


def correlated(*shape: int, seed: int = 0):
    """Channels that have much in common, as those after a norm and a projection do."""
    x = normal(*shape, seed=seed)
    return x + 2 * x.mean(-1, keepdim=True) * shape[-1] ** 0.5


def test_learning_comes_after_and_keeps_the_codes(roads):
    found = []
    for learning in (None, Learning(epochs=10, scale_rate=3e-3, smooth_rate=3e-3)):
        config = QuantConfig(weights={"bits": 4}, activations={"bits": 4}, gptq=True, learning=learning)
        prepared = roads.calibrated(config)
        metadata = metadata_of(prepared)
        first = metadata.blocks[0]["linears"]
        linears = quantized_linears(prepared)[: len(first)]
        found.append((metadata.blocks[0], {linear.name: linear.weight for linear in linears}))
    (alone, fixed), (learned, moved) = found
    assert all(torch.equal(weight.codes, moved[name].codes) for name, weight in fixed.items())
    assert not all(torch.equal(weight.scale, moved[name].scale) for name, weight in fixed.items())
    assert learned["loss_after"] < learned["loss_before"]
    assert learned["cosine_loss"] < alone["cosine_loss"]


@given(positive_sizes, positive_sizes, seeds)
def test_moments_add_up(images, channels, seed):
    x, seen = normal(2 * images, 3, channels, seed=seed), normal(2 * images, 3, channels, seed=seed + 1)
    pieces = moments_of(x[:images], seen[:images])
    pieces.add(x[images:], seen[images:])
    whole = moments_of(x, seen)
    for a, b in ((pieces.own, whole.own), (pieces.cross, whole.cross)):
        assert torch.allclose(a.sum(0), b.sum(0), rtol=1e-5, atol=1e-4)


def test_an_image_and_the_one_after_it_are_in_one_half():
    x, seen = normal(7, 2, 3), normal(7, 2, 3, seed=1)
    found = moments_of(x, seen)
    for half, images in ((0, [0, 1, 4, 5]), (1, [2, 3, 6])):
        own = moments_of(x[images], seen[images]).own.sum(0)
        assert torch.allclose(found.own[half], own, rtol=1e-6)


@given(positive_sizes, positive_sizes, seeds)
def test_where_the_input_is_exact_nothing_is_compensated(outputs, channels, seed):
    x, weight = normal(4, 5, channels, seed=seed), normal(outputs, channels, seed=seed + 1)
    assert torch.equal(compensated_weight(weight, moments_of(x, x), 0.1), weight)


@given(positive_sizes, seeds)
def test_compensation_brings_the_output_nearer(channels, seed):
    x, weight = correlated(16, 9, channels, seed=seed), normal(6, channels, seed=seed + 1)
    seen = (2 * x).round() / 2
    better = compensated_weight(weight, moments_of(x, seen), 0.1)
    before, after = ((seen @ w.t() - x @ weight.t()).square().sum() for w in (weight, better))
    assert after <= before * (1 + 1e-5)


def test_few_tokens_are_not_learned_by_heart():
    """24 tokens of 64 channels, in which rounding follows no rule: what is compensated there is wrong elsewhere."""
    x, weight = normal(8, 3, 64), normal(6, 64, seed=1)
    moments, fresh = moments_of(x, (2 * x).round() / 2), normal(200, 3, 64, seed=2)

    def error(ridge: float) -> float:
        better = compensated_weight(weight, moments, ridge)
        return ((2 * fresh).round() / 2 @ better.t() - fresh @ weight.t()).square().sum().item()

    assert best_ridge(weight, moments) == max(RIDGES)
    assert error(max(RIDGES)) < error(min(RIDGES)) / 1.2


def test_a_rule_that_many_tokens_show_is_compensated():
    """Every channel comes in less half of its neighbour."""
    x, weight = normal(64, 50, 16), normal(6, 16, seed=1)
    seen = x - x.roll(1, -1) / 2
    assert best_ridge(weight, moments_of(x, seen)) == min(RIDGES)


def test_one_image_has_no_other_half():
    x, weight = normal(1, 5, 8), normal(6, 8, seed=1)
    assert best_ridge(weight, moments_of(x, x.round())) == max(RIDGES)


@given(bits, positive_sizes, positive_sizes, seeds)
def test_codes_are_in_bounds_and_the_same_simulated(count, outputs, channels, seed):
    x, weight = correlated(3, 4, channels, seed=seed), normal(outputs, channels, seed=seed + 1)
    codes = gptq_codes(weight, step_of(weight, count), spec(count), moments_of(x, x))
    fake = WeightFakeQuantize(spec(count))
    fake.scale, fake.mode, fake.codes = step_of(weight, count), Mode.QUANTIZE, codes
    assert torch.equal(fake.integers(weight), codes) and codes.dtype == torch.int8
    low, high = spec(count).bounds
    assert low <= codes.min() and codes.max() <= high
    assert torch.equal(fake(weight), codes * fake.scale.unsqueeze(-1))


@given(bits, seeds)
def test_channels_that_share_nothing_are_rounded_to_nearest(count, seed):
    weight, x = normal(5, 8, seed=seed), torch.eye(8).unsqueeze(0)
    step = step_of(weight, count)
    codes = gptq_codes(weight, step, spec(count), moments_of(x, x))
    assert torch.equal(codes, quantization.quantize_weight(weight, step, count))


@pytest.mark.parametrize("count", [3, 4])
def test_on_channels_that_share_much_the_output_is_far_nearer(count):
    x, weight = correlated(32, 9, 48), normal(16, 48, seed=1)
    step = step_of(weight, count)
    nearest = quantization.quantize_weight(weight, step, count)
    found = gptq_codes(weight, step, spec(count), moments_of(x, x))
    before, after = ((x @ (codes * step.unsqueeze(-1) - weight).t()).square().mean() for codes in (nearest, found))
    assert after < before / 2


def test_the_integer_model_has_the_codes(roads, images):
    """Within the grid, not those of rounding to nearest, the same in simulation and in the lowered graph."""
    prepared = roads.calibrated(QuantConfig(weights={"bits": 4}, activations={"bits": 4}, gptq=True))
    linears = quantized_linears(prepared)
    offsets = [linear.weight.codes - weight_of(linear) / linear.weight.scale.unsqueeze(-1) for linear in linears]
    assert any(offset.abs().max() > 0.6 for offset in offsets)
    lowered = convert(prepared)
    for node, linear in zip(
        lowered.graph.find_nodes(op="call_function", target=ops.linear.default), linears, strict=True
    ):
        weight, step = linear.weight, linear.weight.scale
        smoothed = weight_of(linear)
        codes = layouts.unpack_int4(attribute(lowered, str(node.args[3].target)), smoothed.shape[1])
        assert torch.equal(codes * step.unsqueeze(-1), weight(smoothed))


@given(bits, st.sampled_from([2, 3, 5, 8]), seeds)
def test_codes_are_those_of_the_textbook(count, channels, seed):
    """One channel after another, that with the largest input first; what is left over moves the others so that the
    output changes least (GPTQ section 3.1), with a tenth of the mean on the diagonal."""
    x, weight = correlated(4, 5, channels, seed=seed), normal(3, channels, seed=seed + 1)
    x = x * torch.linspace(0.5, 2, channels)[torch.randperm(channels, generator=torch.Generator().manual_seed(seed))]
    step, moments = step_of(weight, count), moments_of(x, x)
    hessian = moments.own.sum(0)
    order = hessian.diagonal().argsort(descending=True).tolist()
    hessian = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(channels, dtype=torch.float64)
    rest, codes = weight.double(), torch.zeros_like(weight, dtype=torch.int8)
    for place, channel in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        chosen = (rest[:, channel] / step.double()).round().clamp(*spec(count).bounds)
        codes[:, channel] = chosen.to(torch.int8)
        error = rest[:, channel] - chosen * step.double()
        rest[:, left] -= error.unsqueeze(1) * inverse[0] / inverse[0, 0]
    assert torch.equal(gptq_codes(weight, step, spec(count), moments), codes)


def moments_with(own) -> Moments:
    moments = Moments(len(own))
    moments.own[0] = moments.cross[0] = own
    return moments


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_inputs_that_have_no_inverse_are_damped_more(size):
    """Not positive by more than rounding makes them; the damping is the same every time."""
    own = size * (torch.ones(6, 6, dtype=torch.float64) - torch.eye(6) * torch.tensor([0.0, 0, 0, 0, 0, 3.0]))
    weight = normal(4, 6)
    target = compensated_weight(weight, moments_with(own), 0.01)
    first, again = (gptq_codes(target, step_of(weight, 4), spec(4), moments_with(own)) for _ in range(2))
    assert torch.isfinite(target).all() and torch.equal(first, again)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_or_weights_that_are_not_finite_are_an_error(bad):
    weight, own = normal(4, 6), torch.eye(6, dtype=torch.float64)
    with pytest.raises(ValueError, match="products of its inputs are not finite"):
        best_ridge(weight, moments_with(own * bad))
    with pytest.raises(ValueError, match="has no inverse in float64, even with 10000 times its mean"):
        gptq_codes(weight, step_of(weight, 4), spec(4), moments_with(own * bad))
    with pytest.raises(ValueError, match="the compensated weight is not finite"):
        gptq_codes(weight * bad, step_of(weight, 4), spec(4), moments_with(own))


def test_a_layer_that_cannot_be_rounded_is_named(monkeypatch):
    prepared = prepare(blocks(), (normal(2, 5, 8),), dataclasses.replace(BEST, learning=None))
    monkeypatch.setattr(Moments, "add", lambda self, x, seen: self.own.fill_(float("inf")))
    with pytest.raises(ValueError, match=r"^layers\.0\.fc1: GPTQ cannot round its weight \(products.*exclude"):
        calibrate(prepared, [normal(8, 5, 8)], progress=False)


@pytest.mark.parametrize("size", [1e6, 1e12, 1e-12])
def test_a_row_far_larger_or_smaller_than_the_rest_is_quantized(size):
    """Its inputs make the next linear's x̂ᵀx̂ ill-conditioned."""
    model, x = blocks(), normal(8, 5, 8)
    with torch.no_grad():
        model.layers[0].fc1.weight[3] *= size
    prepared = prepare(model, (x,), dataclasses.replace(BEST, learning=None))
    quantized = convert(calibrate(prepared, [x], progress=False))
    assert torch.isfinite(quantized(x)).all()


def test_a_models_error_falls(roads, small_vim, images):
    want = small_vim(images)
    plain, better = (
        (convert(roads.calibrated(QuantConfig(weights={"bits": 4}, activations={"bits": 8}, gptq=on)))(images) - want)
        .square()
        .mean()
        for on in (False, True)
    )
    assert better < plain
