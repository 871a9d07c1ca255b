"""Gradients are not left out in silence, and values of arguments are checked, natively and in Python."""

import pytest
import torch
from helpers.operator_inputs import library, quantize_inputs, scan_inputs
from helpers.strategies import integers, normal, seeds
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.ops import fake_quantization


def without_gradient():
    """A call of each kind: codes and numbers, with and without tokens."""
    x, inv_scale, zero_point, inv_smooth, count = quantize_inputs(1, 3, 4)
    codes = integers(-8, 7, 1, 3, 4)
    weight = (torch.ones(5, 4, dtype=torch.int8), torch.ones(5), None, torch.float32)
    norm = (x, x, None, None, 1e-5, True, False, inv_scale, zero_point, inv_smooth, count)
    return {
        "quantize": (x, inv_scale, zero_point, inv_smooth, count),
        "choose_qparams": (x, None, 8),
        "dequantize": (codes, inv_scale, zero_point),
        "linear": (codes, inv_scale, zero_point, *weight),
        "norm_quantize": norm,
        "selective_scan_backward": (normal(1, 3, 4), *scan_inputs(1, 3, 4, 2)),
    }


@pytest.mark.parametrize("implementation", ["operator", "reference"])
@pytest.mark.parametrize("name", without_gradient())
def test_no_gradient_is_left_out_in_silence(name, implementation):
    """For every tensor that could require one. Without gradients the same call is made."""
    call = getattr(library, name) if implementation == "operator" else ops.REFERENCES[name]
    arguments = without_gradient()[name]
    names = [argument.name for argument in getattr(library, name).default._schema.arguments]
    for at, value in enumerate(arguments):
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        inputs = [*arguments[:at], value.clone().requires_grad_(), *arguments[at + 1 :]]
        with pytest.raises(
            RuntimeError, match=rf"ptq4vm::{name}: .* no gradient, and {names[at]} requires one: .*no_grad"
        ):
            call(*inputs)
        middle = [*arguments[:at], value.clone().requires_grad_() * 1, *arguments[at + 1 :]]
        with pytest.raises(RuntimeError, match="no gradient"):
            call(*middle)
        with torch.no_grad():
            call(*inputs)


def test_a_compiled_quantization_leaves_out_no_gradient():
    inputs = quantize_inputs()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + ops.quantize(x, *inputs[1:]), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"ptq4vm::quantize: the operator has no gradient, and x requires one"):
        compiled(inputs[0].clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(compiled(inputs[0]), inputs[0] + ops.quantize(*inputs))


@pytest.mark.parametrize("implementation", ["operator", "reference"])
@given(st.integers(1, 9), st.integers(0, 2), seeds)
def test_every_token_of_an_order_comes_once(implementation, tokens, kind, seed):
    """Permutations of any integer type; what is none is refused, and names the token."""
    random = torch.Generator().manual_seed(seed)
    call = library.conv1d_quantize if implementation == "operator" else ops.REFERENCES["conv1d_quantize"]
    order = torch.randperm(tokens, generator=random).view(1, -1)
    rest = (torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), None, 8)
    arguments = (normal(2, tokens, 3, seed=seed), normal(1, 3, 2), None)
    first = call(*arguments, order.int(), *rest)
    assert all(map(torch.equal, first, call(*arguments, order, *rest)))
    at = int(torch.randint(tokens, (), generator=random))
    wrong = order.clone()
    wrong[0, at] = [-1, tokens, 2**32 + int(order[0, at])][kind]
    with pytest.raises((ValueError, RuntimeError), match=r"ptq4vm::conv1d_quantize: .*order"):
        call(*arguments, wrong, *rest)
    if tokens > 1:
        twice = order.clone()
        twice[0, at] = order[0, at - 1]
        with pytest.raises((ValueError, RuntimeError), match=f"names token {int(order[0, at - 1])} twice"):
            call(*arguments, twice, *rest)


@pytest.mark.parametrize("implementation", ["operator", "reference"])
@pytest.mark.parametrize("value", [128, -129, 2**31, 2**32, -(2**63), 2**63 - 1])
def test_zero_points_are_codes_whatever_their_type(implementation, value):
    call = library.quantize if implementation == "operator" else ops.REFERENCES["quantize"]
    x, one = normal(1, 2, 3), torch.ones(1)
    with pytest.raises((ValueError, RuntimeError), match=f"ptq4vm::quantize: zero_point.* {value}(,|$)"):
        call(x, one, torch.tensor([value]), None, 8)
    assert torch.equal(call(x, one, torch.tensor([-128]), None, 8), call(x, one, torch.tensor([-128]).int(), None, 8))


def test_a_zero_point_that_learns_is_not_cut_to_an_integer():
    x, zero = normal(1, 2, 3) * 9, torch.tensor([1.5])
    ours = library.fake_quantize(x, torch.ones(1), zero, None, 4)
    assert ours.max() == 5.5 and torch.equal(ours, fake_quantization.fake_quantize(x, torch.ones(1), zero, None, 4))


@pytest.mark.parametrize("implementation", ["operator", "reference"])
def test_a_token_of_nan_spoils_no_other(implementation):
    """Dynamic qparams: its results are NaN, and those of all others what they were."""
    call = library if implementation == "operator" else None
    run = (lambda name: getattr(call, name)) if call else ops.REFERENCES.__getitem__
    x = normal(2, 3, 8)
    weight = (torch.randint(-7, 8, (5, 8), dtype=torch.int8), torch.ones(5), None, torch.float32)

    def linear(x):
        scale, zero_point = run("choose_qparams")(x, None, 8)
        return run("linear")(run("quantize")(x, 1 / scale, zero_point, None, 8), scale, zero_point, *weight)

    want, broken = linear(x), x.clone()
    broken[1, 2, 5] = torch.nan
    y = linear(broken)
    assert y[1, 2].isnan().all()
    y[1, 2] = want[1, 2]
    assert torch.equal(y, want)


@pytest.mark.parametrize("implementation", ["operator", "reference"])
def test_nothing_in_very_many_places_takes_no_time(implementation):
    many, zero = 2**40, torch.zeros(1, dtype=torch.int32)
    run = (lambda name: getattr(library, name)) if implementation == "operator" else ops.REFERENCES.__getitem__
    u, states, A = torch.empty(many, 0, 8), torch.empty(many, 0, 2), torch.ones(8, 2)
    scan = (u, u, A, states, states, None, None, None, True)
    one = torch.ones(1)
    assert run("selective_scan")(*scan).shape == u.shape
    assert run("selective_scan_quantized")(*scan, one, one, 8).shape == u.shape
    assert not run("selective_scan_backward")(u, *scan)[2].any()
    assert run("causal_conv1d")(u, torch.ones(8, 4), None, True).shape == u.shape
    assert not run("causal_conv1d_backward")(u, u, torch.ones(8, 4), None, True)[1].any()
    assert run("quantize")(u, one, zero, None, 8).shape == u.shape
    time = torch.empty(0, many, 8)
    states = torch.empty(0, many, 2)
    assert (
        run("selective_scan_quantized")(time, time, A, states, states, None, None, None, True, one, one, 8).numel() == 0
    )
    x = torch.empty(0, 0, 8)
    assert (
        run("conv2d_quantize")(x, torch.ones(8, 1, 1), None, 0, many, one.view(1, 1), zero.view(1, 1), None, 8)[
            1
        ].numel()
        == 0
    )


@pytest.mark.parametrize("implementation", ["operator", "reference"])
@pytest.mark.parametrize(("height", "width"), [(2**62, 4), (2**32, 2**32), (-1, -6), (2**63 - 1, 2), (6, 2)])
def test_a_map_has_its_tokens_in_any_arithmetic(implementation, height, width):
    call = library.conv2d_quantize if implementation == "operator" else ops.REFERENCES["conv2d_quantize"]
    zero = torch.zeros(1, 1, dtype=torch.int32)
    for tokens in (0, 6):
        with pytest.raises((ValueError, RuntimeError), match=r"ptq4vm::conv2d_quantize: .*height"):
            call(normal(1, tokens, 3), normal(3, 1, 1), None, height, width, torch.ones(1, 1), zero, None, 8)
