"""scans.selective_scan_quantized: laws that say which value is rounded, when, and with which token's scale."""

import pytest
import torch
from helpers.draws import counting, draw, largest_states, scan_inputs
from helpers.strategies import bits, normal, positive_sizes, seeds, sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.ops import scans

TOKENS = st.sampled_from([0, 1, 2, 17, 33])


def on_the_grid(images, tokens, channels, states, seed):
    """States are small integers: no decay, and products of u, Δ and B that are -1, 0 or 1."""
    random = draw(seed)

    def integers(*shape):
        return torch.randint(-1, 2, shape, generator=random).float()

    u, delta = integers(images, tokens, channels), integers(images, tokens, channels).abs()
    B, C = integers(images, tokens, states), integers(images, tokens, states)
    return u, delta, torch.zeros(channels, states), B, C, integers(channels), None, None, False


@given(bits)
def test_a_sum_grows_by_the_rounded_value_until_the_last_code(bits):
    """3/4 is read before it is rounded to 1."""
    half, t = 2 ** (bits - 1), torch.arange(140.0).view(1, -1, 1)
    up, down = (scans.selective_scan_quantized(*counting(u, 140), bits) for u in (0.75, -0.75))
    assert torch.equal(up, t.clamp(max=half - 1) + 0.75)
    assert torch.equal(down, -t.clamp(max=half) - 0.75)


def test_ties_go_to_even():
    u, *rest = counting(1.0, 4)
    u[0, :, 0] = torch.tensor([0.5, 1.5, 0.5, 1.0])  # states 0.5 → 0, 1.5 → 2, 2.5 → 2, 3
    assert scans.selective_scan_quantized(u, *rest, 8).flatten().tolist() == [0.5, 1.5, 2.5, 3.0]


@given(sizes, TOKENS, positive_sizes, positive_sizes, seeds)
@settings(max_examples=25)
def test_states_that_are_codes_stay_as_they_are(images, tokens, channels, states, seed):
    """Whatever the tokens' scales, if they divide the states."""
    inputs = on_the_grid(images, tokens, channels, states, seed)
    scale = 0.5 ** torch.randint(0, 2, (tokens,), generator=draw(seed))
    ours = scans.selective_scan_quantized(*inputs, scale, 1 / scale, 8)
    assert torch.equal(ours, scans.selective_scan(*inputs))


@given(TOKENS, st.booleans(), bits, seeds)
@settings(max_examples=25)
def test_one_scale_is_the_same_for_every_token(tokens, optional, bits, seed):
    inputs = (*scan_inputs(2, tokens, 5, 3, optional, draw(seed)), True)
    scale = torch.tensor([0.03])
    every = scale.repeat(tokens)
    one = scans.selective_scan_quantized(*inputs, scale, 1 / scale, bits)
    assert torch.equal(one, scans.selective_scan_quantized(*inputs, every, 1 / every, bits))


@given(st.integers(0, 16), bits, seeds)
@settings(max_examples=25)
def test_a_tokens_scale_is_seen_by_later_tokens_only(token, bits, seed):
    inputs = (*scan_inputs(1, 17, 5, 3, True, draw(seed)), True)
    scale = torch.full((17,), 0.1)
    before = scans.selective_scan_quantized(*inputs, scale, 1 / scale, bits)
    scale[token] = 0.05
    after = scans.selective_scan_quantized(*inputs, scale, 1 / scale, bits)
    assert torch.equal(before[:, : token + 1], after[:, : token + 1])
    assert token == 16 or not torch.equal(before[:, token + 1 :], after[:, token + 1 :])


@given(st.integers(-3, 3), st.booleans(), bits, seeds)
@settings(max_examples=25)
def test_twice_the_scale_goes_with_twice_the_input(power, optional, bits, seed):
    u, *rest = (*scan_inputs(2, 17, 5, 3, optional, draw(seed)), True)
    scale, factor = torch.rand(17, generator=draw(seed)) / 20 + 0.01, 2.0**power
    once = scans.selective_scan_quantized(u, *rest, scale, 1 / scale, bits)
    more = scans.selective_scan_quantized(factor * u, *rest, factor * scale, 1 / (factor * scale), bits)
    assert torch.equal(more, factor * once)


@given(seeds)
@settings(max_examples=10)
def test_more_bits_are_nearer_to_the_scan_in_floating_point(seed):
    inputs = (*scan_inputs(2, 33, 16, 4, True, draw(seed)), True)
    largest = largest_states(*inputs[:4], inputs[7])
    exact = scans.selective_scan(*inputs)
    errors = []
    for b in (3, 5, 8):
        scale = largest / 2 ** (b - 1)
        errors.append((scans.selective_scan_quantized(*inputs, scale, 1 / scale, b) - exact).norm() / exact.norm())
    assert errors[0] > 2 * errors[1] > 8 * errors[2] and errors[2] < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_goes_straight_through(dtype):
    inputs = [None if x is None else x.to(dtype) for x in scan_inputs(2, 17, 5, 3, True, draw(0))]
    scale, grad = torch.full((17,), 0.05), normal(2, 17, 5, seed=1).to(dtype)

    def gradients(scan, *states):
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(scan(*leaves, True, *states), leaves, grad)

    ours = gradients(ops.selective_scan_quantized, scale, 1 / scale, 4)
    assert all(map(torch.equal, ours, gradients(ops.selective_scan)))


def test_scales_of_another_number_of_tokens_are_named_before_anything_runs():
    inputs = [None if x is None else x.to("meta") for x in scan_inputs(1, 4, 5, 3, True, draw(0))]
    with pytest.raises(ValueError, match="calibrated for another number of tokens"):
        ops.selective_scan_quantized(*inputs, True, torch.ones(3, device="meta"), torch.ones(3, device="meta"), 8)
