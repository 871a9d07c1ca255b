"""The native scan with quantized states on every instruction set."""

from itertools import pairwise

import pytest
import torch
from helpers.draws import (
    SCAN_CHANNELS,
    STATES,
    SUPPRESSED,
    assert_threads_change_no_bit,
    counting,
    draw,
    largest_states,
    needs_library,
    part,
    relative,
    scan_inputs,
)
from helpers.strategies import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.ops import scans

TOKENS = st.sampled_from([0, 1, 15, 16, 17, 33])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def exact_inputs(images, tokens, channels, states, per_token, optional, random):
    """Without decay, and of values so short that no sum is rounded: many states are ties, or beyond the last code.

    Some steps are negative if what is optional is there, which the kernel takes another path for.
    """

    def over(denominator, low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=random) / denominator

    u, delta = over(4, -16, 16, images, tokens, channels), over(2, -optional, 4, images, tokens, channels)
    B, C = (over(2, -4, 4, images, tokens, states) for _ in range(2))
    D, bias = (over(2, -4, 4, channels) if optional else None for _ in range(2))
    scale = 2.0 ** torch.randint(-2, 3, (tokens if per_token else 1,), generator=random)
    return u, delta, torch.zeros(channels, states), B, C, D, None, bias, False, scale, 1 / scale


def real_inputs(images, tokens, channels, states, random, bits=8, rate=1.0):
    """With decays, and scales as calibration finds them."""
    inputs = [*scan_inputs(images, tokens, channels, states, True, random), True]
    inputs[2] *= rate
    scale = largest_states(*inputs[:4], inputs[7]).clamp(min=1e-6) / (2 ** (bits - 1) - 1)
    return *inputs, scale, 1 / scale, bits


def as_parts(inputs, dtype, random):
    """u, delta, B, C and z as parts of larger rows."""
    u, delta, A, B, C, D, z, *rest = inputs
    u, delta, B, C, z = (None if x is None else part(x, dtype, random) for x in (u, delta, B, C, z))
    return u, delta, A, B, C, D, z, *rest


@needs_library
@DTYPES
@given(st.integers(0, 2), TOKENS, SCAN_CHANNELS, STATES, st.booleans(), st.booleans(), bits, st.integers(0, 2**20))
@settings(max_examples=12, suppress_health_check=SUPPRESSED)
def test_what_no_sum_rounds_is_the_references_to_the_last_bit(
    isa, dtype, images, tokens, channels, states, per_token, optional, bits, seed
):
    random = draw(seed)
    inputs = exact_inputs(images, tokens, channels, states, per_token, optional, random)
    ours = ops.selective_scan_quantized(*as_parts(inputs, dtype, random), bits)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert torch.equal(ours, scans.selective_scan_quantized(*inputs, bits).to(dtype))


@needs_library
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_sum_grows_by_the_rounded_value_until_the_last_code(isa, bits):
    for u in (0.75, -0.75):
        inputs = counting(u, 140)
        want = scans.selective_scan_quantized(*inputs, bits)
        assert torch.equal(ops.selective_scan_quantized(*inputs, bits), want)
        assert torch.equal(want[0, -5:, 0], torch.full((5,), (2 ** (bits - 1) - (u > 0)) * (u / 0.75) + u))


@needs_library
@DTYPES
@given(st.integers(0, 2), TOKENS, SCAN_CHANNELS, STATES, st.integers(-3, 3), bits, st.integers(0, 2**20))
@settings(max_examples=10, suppress_health_check=SUPPRESSED)
def test_neither_layout_nor_the_unit_of_the_input_changes_a_bit(
    isa, dtype, images, tokens, channels, states, power, bits, seed
):
    """With decays: parts of rows are read as their copies are, and the result is linear in u and the scale together."""
    random, factor = draw(seed), 2.0**power
    inputs = as_parts(real_inputs(images, tokens, channels, states, random, bits), dtype, random)
    ours = ops.selective_scan_quantized(*inputs)
    u, *rest, scale, inv_scale, _ = (
        x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x for x in inputs
    )
    again = ops.selective_scan_quantized(factor * u, *rest, factor * scale, inv_scale / factor, bits)
    assert ours.dtype == dtype and torch.equal(again, factor * ours)


@needs_library
@pytest.mark.parametrize(("rate", "states"), [(0.01, 17), (1.0, 16), (1.0, 1), (60.0, 3)])
def test_hardly_an_output_differs_from_the_references(isa, rate, states):
    """Another last bit of a decay moves a state that lies between two codes by one, and later outputs see it.

    Of twenty draws the worst share was 0.0044, the mean 0.0004, and the largest difference 0.0066: all where decays
    are slow.
    """
    inputs = real_inputs(2, 197, 72, states, draw(states), rate=rate)
    theirs = scans.selective_scan_quantized(*inputs)
    off = (ops.selective_scan_quantized(*inputs) - theirs).abs() / theirs.abs().max()
    assert (off > 1e-5).float().mean() <= 5e-3 and off.max() <= 1e-2


@needs_library
def test_the_error_falls_with_the_bits(isa):
    inputs = real_inputs(2, 65, 40, 16, draw(0))
    exact, errors = scans.selective_scan(*inputs[:9]), []
    for b in range(3, 9):
        scale = 127 * inputs[9] / 2 ** (b - 1)
        off = ops.selective_scan_quantized(*inputs[:9], scale, 1 / scale, b) - exact
        errors.append(off.norm() / exact.norm())
    assert all(more < 0.75 * less for less, more in pairwise(errors)) and errors[-1] < 0.03


@needs_library
def test_the_number_of_threads_changes_no_bit(isa):
    inputs = real_inputs(1, 33, 600, 3, draw(0))
    assert_threads_change_no_bit(lambda: (ops.selective_scan_quantized(*inputs),))


@needs_library
@pytest.mark.parametrize("token", [0, 5, 15, 16, 30])
@pytest.mark.parametrize("name", ["u", "delta", "B"])
def test_a_state_that_is_not_a_number_has_the_code_zero(isa, name, token):
    """So tokens after it are those of a scan that begins there."""
    inputs = dict(
        zip(["u", "delta", "A", "B", "C"], exact_inputs(1, 40, 20, 5, False, False, draw(0))[:5], strict=True)
    )
    rest = None, None, None, False, torch.ones(1), torch.ones(1), 8
    inputs[name][:, token] = torch.nan
    ours = ops.selective_scan_quantized(*inputs.values(), *rest)
    assert ours[:, token].isnan().all() and ours[:, :token].isfinite().all()
    later = (x if key == "A" else x[:, token + 1 :] for key, x in inputs.items())
    assert torch.equal(ours[:, token + 1 :], ops.selective_scan_quantized(*later, *rest))


@needs_library
def test_infinite_states_have_the_last_codes(isa):
    u, delta, A, B, C, *rest = exact_inputs(2, 40, 20, 5, True, False, draw(1))
    u[:, 7, ::2], u[:, 16, 1::3] = torch.inf, -torch.inf
    delta, B = delta + 0.5, torch.where(B == 0, 1.0, B)
    inputs = u, delta, A, B, C, *rest, 6
    ours, theirs = ops.selective_scan_quantized(*inputs), scans.selective_scan_quantized(*inputs)
    assert theirs[:, 17:].isfinite().all()
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@needs_library
@given(st.integers(0, 2), TOKENS, STATES, st.booleans(), bits, st.integers(0, 2**20))
@settings(max_examples=20)
def test_float64_is_computed_in_float64(images, tokens, states, softplus, bits, seed):
    inputs = real_inputs(images, tokens, 5, states, draw(seed), bits)
    inputs = [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]
    inputs[8] = softplus
    if not softplus:
        inputs[1], inputs[7] = inputs[1].abs(), None
    ours = ops.selective_scan_quantized(*inputs)
    assert ours.dtype == torch.float64
    assert relative(ours, scans.selective_scan_quantized(*inputs)) <= 1e-12


@needs_library
def test_other_types_are_computed_in_float32_and_given_back():
    inputs = exact_inputs(2, 17, 5, 3, True, True, draw(0))
    halves = [x.half() if isinstance(x, torch.Tensor) else x for x in inputs[:9]]
    ours = ops.selective_scan_quantized(*halves, *inputs[9:], 8)
    assert ours.dtype == torch.half and torch.equal(ours, scans.selective_scan_quantized(*inputs, 8).half())


@needs_library
@pytest.mark.parametrize(("sizes", "optional"), [((2, 3, 4, 2), True), ((1, 0, 4, 2), False)])
@pytest.mark.parametrize(
    "checks",
    [
        ("test_schema", "test_autograd_registration", "test_faketensor"),
        pytest.param(("test_aot_dispatch_dynamic",), marks=pytest.mark.slow),
    ],
    ids=["eager", "traced"],
)
def test_the_operator_is_a_good_one(sizes, optional, checks):
    leaves = [x if x is None else x.requires_grad_() for x in scan_inputs(*sizes, optional, draw(0))]
    scale = torch.full((sizes[1],), 0.1)
    operator = ops.selective_scan_quantized.default
    torch.library.opcheck(operator, (*leaves, True, scale, 1 / scale, 4), test_utils=checks)


@needs_library
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (9, torch.ones(3), "state scales were calibrated for 3 tokens, the input has 4"),
        (9, torch.ones(1, 4), "state_scale has another shape"),
        (10, torch.ones(1), "state_inv_scale has another shape"),
        (11, 1, "bits must be between 2 and 8, got 1"),
        (11, 9, "bits must be between 2 and 8, got 9"),
        (3, torch.ones(1, 4, 2), "B has another shape"),
        (6, torch.ones(1, 4, 4), "z has another shape"),
    ],
)
def test_wrong_arguments_are_named(position, value, message):
    inputs = list(real_inputs(1, 4, 5, 3, draw(0)))
    inputs[position] = value
    with pytest.raises(RuntimeError, match=message):
        ops.selective_scan_quantized(*inputs)
