"""The native scans on every instruction set: selective_scan on parts of larger rows, and the directional scans."""

import pytest
import torch
from helpers.draws import (
    HALF,
    SCAN_CHANNELS,
    STATES,
    SUPPRESSED,
    assert_threads_change_no_bit,
    directional_inputs,
    draw,
    exact_directional,
    needs_library,
    part,
    relative,
    scan_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.ops import directional_scans, quantization, scans

TOKENS = st.sampled_from([0, 1, 2, 15, 16, 17, 49, 65])
"""The largest relative error of rounding to bfloat16, twice over."""


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(0, 2), TOKENS, SCAN_CHANNELS, STATES, st.booleans(), st.integers(0, 2**20))
@settings(max_examples=30, suppress_health_check=SUPPRESSED)
def test_the_scan_reads_parts_of_rows_in_both_types(isa, dtype, images, tokens, channels, states, optional, seed):
    random = draw(seed)
    u, delta, A, B, C, D, z, bias = scan_inputs(images, tokens, channels, states, optional, random)
    u, delta, B, C, z = (None if x is None else part(x, dtype, random) for x in (u, delta, B, C, z))
    inputs = (u, delta, A, B, C, D, z, bias)
    exact = scans.selective_scan(*(None if x is None else x.double() for x in inputs), True)
    ours = ops.selective_scan(*inputs, True)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert relative(ours, exact) <= (1e-5 if dtype == torch.float32 else HALF)
    copies = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs]
    assert torch.equal(ours, ops.selective_scan(*copies, True))
    grad = torch.randn(images, tokens, channels, generator=random)
    backward = torch.ops.ptq4vm.selective_scan_backward
    assert all(map(torch.equal, backward(grad, *inputs, True), backward(grad, *copies, True)))


@needs_library
@pytest.mark.parametrize("rate", [1e-5, 1e-3, 1e-1])
def test_slow_decays_stay_exact_over_many_tokens(isa, rate):
    """In lanes beside fast ones, too, which take another path."""
    random = draw(0)
    u, delta, A, B, C, *_ = scan_inputs(1, 3136, 48, 4, False, random)
    delta = torch.rand(delta.shape, generator=random)
    A = -rate * torch.rand(A.shape, generator=random)
    A[16:] *= torch.where(torch.rand(32, 4, generator=random) < 0.5, 1.0, 200 / rate)
    inputs = (u.abs(), delta, A, B.abs(), C.abs(), None, None, None)
    exact = scans.selective_scan(*(None if x is None else x.double() for x in inputs), False)
    ours = ops.selective_scan(*inputs, False)
    assert float(((ours - exact).abs() / exact.abs().amax(1, keepdim=True)).max()) <= 1e-5


@needs_library
def test_decays_that_no_float_holds_are_zero(isa):
    """Steps times rates beyond the exponents of float32, in some lanes and tokens only."""
    random = draw(1)
    inputs = list(scan_inputs(2, 40, 33, 5, True, random))
    inputs[1][:, 20:, ::3] += 300
    exact = [None if x is None else x.double() for x in inputs]
    assert relative(ops.selective_scan(*inputs, True), scans.selective_scan(*exact, True)) <= 1e-5


DIRECTIONAL = (
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([1, 2, 15, 16, 17, 49]),
    SCAN_CHANNELS,
    st.sampled_from([1, 3, 6, 16, 24, 48, 70]),
    STATES,
    st.booleans(),
    st.sampled_from([4, 6, 8]),
    st.sampled_from([0, 1, 9, 40]),
)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.tuples(*DIRECTIONAL), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_the_directional_scan_is_the_references(isa, dtype, sizes, merge, seed):
    inputs = directional_inputs(draw(seed), *sizes, dtype)
    ours = ops.directional_scan(*inputs, merge, 0.5)
    theirs = exact_directional(inputs, merge, 0.5)
    assert ours.dtype == dtype and ours.shape == theirs.shape
    assert relative(ours, theirs) <= (1e-5 if dtype == torch.float32 else HALF)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.tuples(*DIRECTIONAL), st.booleans(), st.booleans(), st.integers(2, 8), st.integers(0, 2**20))
@settings(max_examples=30, suppress_health_check=SUPPRESSED)
def test_the_codes_of_the_scan_are_those_of_its_outputs(isa, dtype, sizes, per_token, smooth, bits, seed):
    """Exactly, as the outputs are the same: quantizing is bit for bit the reference's."""
    random = draw(seed)
    inputs = directional_inputs(random, *sizes, dtype)
    tokens, channels = inputs[0].shape[2:]
    inv_scale = torch.rand(tokens if per_token else 1, generator=random) * 2**bits / 8
    zero_point = torch.randint(-2, 2, inv_scale.shape, generator=random, dtype=torch.int32)
    qparams = (inv_scale, zero_point, torch.rand(channels, generator=random) if smooth else None, bits)
    wide = (inputs[0].float(), *inputs[1:])
    assert torch.equal(
        ops.directional_scan_quantize(*inputs, 0.5, *qparams),
        quantization.quantize(ops.directional_scan(*wide, True, 0.5), *qparams),
    )


@needs_library
def test_hardly_a_code_differs_from_the_references(isa):
    random = draw(3)
    inputs = directional_inputs(random, 2, False, 2, 49, 192, 12, 16, True, 8, 0, torch.float32)
    y = directional_scans.directional_scan(*inputs, True, 0.5)
    scale = y.abs().amax((0, 2)) / 127
    qparams = (1 / scale, torch.zeros(49, dtype=torch.int32), None, 8)
    ours = ops.directional_scan_quantize(*inputs, 0.5, *qparams).int()
    off = (ours - directional_scans.directional_scan_quantize(*inputs, 0.5, *qparams).int()).abs()
    assert off.max() <= 1 and off.bool().float().mean() < 1e-3


@needs_library
def test_the_number_of_threads_changes_no_bit_of_a_scan(isa):
    random = draw(0)
    narrow = scan_inputs(1, 33, 600, 3, True, random)
    grad = torch.randn(1, 33, 600, generator=random)
    inputs = directional_inputs(random, 2, False, 1, 65, 600, 6, 4, True, 8, 3, torch.float32)
    qparams = (torch.full((1,), 20.0), torch.zeros(1, dtype=torch.int32), None, 8)

    def everything():
        return (
            ops.selective_scan(*narrow, True),
            *torch.ops.ptq4vm.selective_scan_backward(grad, *narrow, True),
            ops.directional_scan(*inputs, True, 0.5),
            ops.directional_scan(*inputs, False, 0.5),
            ops.directional_scan_quantize(*inputs, 0.5, *qparams),
        )

    assert_threads_change_no_bit(everything)


@needs_library
@given(st.tuples(*DIRECTIONAL), st.integers(0, 2**20))
@settings(max_examples=20)
def test_gradients_of_many_channels_are_the_references(sizes, seed):
    """More channels than a panel has, whose shares of the gradients of B and C are summed."""
    random = draw(seed)
    inputs = scan_inputs(1, sizes[3], 257 + sizes[4], 2, True, random)
    grad = torch.randn(inputs[0].shape, generator=random)
    exact = tuple(None if value is None else value.double() for value in inputs)
    ours = torch.ops.ptq4vm.selective_scan_backward(grad, *inputs, True)
    theirs = scans.selective_scan_backward(grad.double(), *exact, True)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-5


@needs_library
def test_a_wrong_order_is_named():
    inputs = list(directional_inputs(draw(0), 1, True, 1, 4, 3, 2, 1, False, 8, 0, torch.float32))
    inputs[-1] = inputs[-1] + 1
    with pytest.raises(RuntimeError, match="between -1 and 3"):
        ops.directional_scan(*inputs, True, 1.0)
