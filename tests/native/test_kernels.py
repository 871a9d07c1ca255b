"""Native kernels are the references, on every instruction set."""

import pytest
import torch
from helpers.draws import (
    CHANNELS,
    FEATURES,
    KINDS,
    ROWS,
    SUPPRESSED,
    assert_threads_change_no_bit,
    draw,
    needs_library,
    qparams,
    relative,
    scan_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.ops import convolution_1d, layouts, linears, quantization, scans


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(0, 3), ROWS, CHANNELS, st.integers(2, 8), KINDS, st.booleans(), st.integers(0, 2**20))
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_codes_are_the_references(isa, dtype, images, tokens, channels, bits, kind, smooth, seed):
    random = draw(seed)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    # some values so large that they are clamped, some exactly between two codes
    x = torch.randn(images, tokens, channels, generator=random) * 10 ** (seed % 7)
    x = torch.where(torch.rand(x.shape, generator=random) < 0.3, torch.round(x) + 0.5, x).to(dtype)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    arguments = (x, 1 / scale, zero_point, inv_smooth, bits)
    assert torch.equal(ops.quantize(*arguments), quantization.quantize(*arguments))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    st.integers(0, 3), ROWS, CHANNELS, FEATURES, st.sampled_from([4, 8]), KINDS, st.booleans(), st.integers(0, 2**20)
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_the_linear_is_the_references_to_the_last_bit(
    isa, dtype, images, tokens, channels, features, bits, kind, bias, seed
):
    random, half = draw(seed), 2 ** (bits - 1)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    x = torch.randint(-half, half, (images, tokens, channels), generator=random, dtype=torch.int8)
    weight = torch.randint(1 - half, half, (features, channels), generator=random, dtype=torch.int8)
    stored = layouts.pack_int4(weight) if bits == 4 else weight
    arguments = (
        x,
        scale,
        zero_point,
        stored,
        torch.rand(features, generator=random),
        torch.randn(features, generator=random) if bias else None,
        dtype,
    )
    assert torch.equal(ops.linear(*arguments), linears.linear(*arguments))


@needs_library
def test_the_largest_accumulators_are_exact(isa):
    """All codes at their ends: nothing saturates on the way."""
    for x, w in ((-128, -127), (-128, 127), (127, 127), (127, -127)):
        codes, weight = torch.full((1, 33, 2048), x, dtype=torch.int8), torch.full((40, 2048), w, dtype=torch.int8)
        one, zero = torch.ones(1), torch.full((1,), -128, dtype=torch.int32)
        y = ops.linear(codes, one, zero, weight, torch.ones(40), None, torch.float32)
        assert torch.equal(y, torch.full_like(y, 2048.0 * (x + 128) * w))


@needs_library
@given(
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, 31, 33, 65, 197]),
    st.sampled_from([1, 15, 16, 17, 33]),
    st.sampled_from([1, 2, 3, 8, 16, 17]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_the_scan_and_its_gradients_are_the_references(isa, images, tokens, channels, states, optional, softplus, seed):
    random = draw(seed)
    inputs = scan_inputs(images, tokens, channels, states, optional, random)
    if not softplus:
        inputs = (inputs[0], inputs[1].abs(), *inputs[2:7], None)
    grad = torch.randn(images, tokens, channels, generator=random)
    exact = tuple(None if value is None else value.double() for value in inputs)
    assert relative(ops.selective_scan(*inputs, softplus), scans.selective_scan(*exact, softplus)) <= 1e-5
    ours = torch.ops.ptq4vm.selective_scan_backward(grad, *inputs, softplus)
    theirs = scans.selective_scan_backward(grad.double(), *exact, softplus)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-5


@needs_library
@given(
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, 3, 31, 33, 197]),
    st.sampled_from([1, 15, 16, 17, 33, 100]),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_the_convolution_and_its_gradients_are_the_references(isa, images, tokens, channels, taps, bias, silu, seed):
    random = draw(seed)
    x, grad = (torch.randn(images, tokens, channels, generator=random) for _ in range(2))
    weight = torch.randn(channels, taps, generator=random)
    inputs = (x, weight, torch.randn(channels, generator=random) if bias else None)
    exact = tuple(None if value is None else value.double() for value in inputs)
    assert relative(ops.causal_conv1d(*inputs, silu), convolution_1d.causal_conv1d(*exact, silu)) <= 1e-5
    ours = torch.ops.ptq4vm.causal_conv1d_backward(grad, *inputs, silu)
    theirs = convolution_1d.causal_conv1d_backward(grad.double(), *exact, silu)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-5


@needs_library
def test_the_number_of_threads_changes_no_bit(isa):
    random = draw(0)
    inputs = scan_inputs(3, 65, 40, 16, True, random)
    grad = torch.randn(3, 65, 40, generator=random)
    codes = torch.randint(-128, 128, (3, 197, 96), generator=random, dtype=torch.int8)
    weight = torch.randint(-127, 128, (200, 96), generator=random, dtype=torch.int8)
    scale, zero_point = qparams("token", 3, 197, 8, random)
    taps = torch.randn(40, 4, generator=random)

    def everything():
        return (
            ops.selective_scan(*inputs, True),
            *torch.ops.ptq4vm.selective_scan_backward(grad, *inputs, True),
            ops.causal_conv1d(inputs[0], taps, None, True),
            *torch.ops.ptq4vm.causal_conv1d_backward(grad, inputs[0], taps, None, True),
            ops.linear(codes, scale, zero_point, weight, torch.ones(200), None, torch.float32),
            ops.quantize(codes.float(), 1 / scale, zero_point, None, 8),
        )

    assert_threads_change_no_bit(everything)


@needs_library
def test_schemas_are_the_same_with_and_without_the_library():
    for schema in ops.SCHEMAS:
        name = schema.split("(", 1)[0]
        want = torch._C.parse_schema(f"ptq4vm::{schema}")
        assert str(getattr(torch.ops.ptq4vm, name).default._schema) == str(want)
