"""Packed linears on every instruction set here: the reference's floats to the last bit, its codes but for ties."""

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
    linear_inputs,
    needs_library,
    packed,
    qparams,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.ops import layouts, linears

BITS = st.sampled_from([4, 8])
SEEDS = st.integers(0, 2**20)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    st.sampled_from([None, None, 1, 3]),
    st.integers(0, 2),
    ROWS,
    CHANNELS,
    FEATURES,
    BITS,
    KINDS,
    st.booleans(),
    SEEDS,
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_packed_linears_are_the_references_to_the_last_bit(
    isa, dtype, stack, images, tokens, channels, features, bits, kind, bias, seed
):
    arguments = linear_inputs(stack, images, tokens, channels, features, bits, kind, bias, draw(seed))
    assert torch.equal(ops.linear_packed(*arguments, dtype), linears.linear_packed(*arguments, dtype))


@needs_library
@given(st.sampled_from([None, 1, 3]), ROWS, CHANNELS, FEATURES, BITS, st.booleans(), SEEDS)
@settings(max_examples=30, suppress_health_check=SUPPRESSED)
def test_rows_of_a_model_that_was_fused_for_a_gpu_are_taken_too(
    isa, stack, tokens, channels, features, bits, gelu, seed
):
    x, scale, zero_point, tiles, *rest = linear_inputs(
        stack, 1, tokens, channels, features, bits, "token", True, draw(seed)
    )
    rows = layouts.pad_weight(layouts.unpack_weight(tiles, features, channels), bits)
    assert rows.shape[-1] * (2 if bits == 4 else 1) % (32 if bits == 4 else 16) == 0
    operator, reader, last = ops.linear_packed, linears.linear_packed, (torch.float32,)
    if gelu and stack is None:
        one = (seed % 2 == 1, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, 8)
        operator, reader, last = ops.linear_gelu_quantize, linears.linear_gelu_quantize, one
    want = operator(x, scale, zero_point, tiles, *rest, *last)
    assert torch.equal(operator(x, scale, zero_point, rows, *rest, *last), want)
    assert torch.equal(
        reader(x, scale, zero_point, rows, *rest, *last), reader(x, scale, zero_point, tiles, *rest, *last)
    )


@needs_library
@pytest.mark.parametrize("tokens", [1, 33, 197])
def test_the_largest_accumulators_are_exact(isa, tokens):
    """All codes at their ends, the zero point too: nothing saturates on the way."""
    for x, w, z in ((-128, -127, 127), (-128, 127, 127), (127, 127, -128), (127, -127, -128), (127, 127, 127)):
        codes, weight = torch.full((1, tokens, 3072), x, dtype=torch.int8), torch.full((40, 3072), w, dtype=torch.int8)
        one, zero_point = torch.ones(1), torch.full((1,), z, dtype=torch.int32)
        y = ops.linear_packed(codes, one, zero_point, *packed(weight, 8), torch.ones(40), None, torch.float32)
        assert torch.equal(y, torch.full_like(y, 3072.0 * (x - z) * w))


@needs_library
@pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-22])
def test_denormal_results_are_kept(isa, size):
    """Where float32 has results denormal, and bfloat16 with them."""
    x, scale, zero_point, weight, weight_sum, weight_scale, bias = linear_inputs(
        None, 1, 40, 64, 48, 8, "token", True, draw(0)
    )
    arguments = (x, scale * size, zero_point, weight, weight_sum, weight_scale * size, bias * size * size)
    for dtype in (torch.float32, torch.bfloat16):
        y = linears.linear_packed(*arguments, dtype)
        assert (y != 0).any()
        assert torch.equal(ops.linear_packed(*arguments, dtype), y)


@needs_library
@given(
    st.integers(0, 2), ROWS, CHANNELS, FEATURES, BITS, KINDS, KINDS, st.booleans(), st.booleans(), st.booleans(), SEEDS
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_codes_after_a_gelu_are_the_references_but_for_ties(
    isa, images, tokens, channels, features, bits, kind, new_kind, bias, smooth, rotated, seed
):
    random = draw(seed)
    linear = linear_inputs(None, images, tokens, channels, features, bits, kind, bias, random)
    new_scale, new_zero_point = qparams(new_kind, images, tokens, bits, random)
    inv_smooth = torch.rand(features, generator=random) if smooth else None
    linear = (linear[0], linear[1] / 40, *linear[2:])
    arguments = (*linear, rotated, 1 / (new_scale * channels**0.5), new_zero_point, inv_smooth, bits)
    ours, theirs = (op(*arguments).int() for op in (ops.linear_gelu_quantize, linears.linear_gelu_quantize))
    assert ours.shape == theirs.shape
    different = (ours - theirs).abs()
    assert (different <= 1).all() and different.sum() <= 1 + 0.001 * different.numel()


@needs_library
def test_blocks_of_rotated_rows_have_their_own_tokens_scales(isa):
    """Rows this long are rotated 32 at a time, and tokens begin anew within a block."""
    random = draw(2)
    linear = linear_inputs(None, 3, 25, 64, 6144, 4, "token", True, random)
    new_scale, new_zero_point = qparams("token", 3, 25, 4, random)
    arguments = (linear[0], linear[1] / 40, *linear[2:], True, 1 / (8 * new_scale), new_zero_point, None, 4)
    ours, theirs = (op(*arguments).int() for op in (ops.linear_gelu_quantize, linears.linear_gelu_quantize))
    assert theirs.unique().numel() == 16
    different = (ours - theirs).abs()
    assert different.max() <= 1 and different.float().mean() < 0.001


@needs_library
def test_few_codes_after_a_gelu_differ(isa):
    random = draw(1)
    linear = linear_inputs(None, 1, 400, 64, 200, 8, "tensor", False, random)
    linear = (linear[0], torch.full((1,), 1e-4), *linear[2:])  # outputs within about ±5
    new = (torch.full((1,), 40.0), torch.full((1,), -100, dtype=torch.int32), None, 8)
    ours, theirs = (op(*linear, False, *new).int() for op in (ops.linear_gelu_quantize, linears.linear_gelu_quantize))
    assert theirs.unique().numel() > 100
    different = (ours - theirs).abs()
    assert different.max() <= 1 and different.float().mean() < 0.001


@needs_library
def test_the_number_of_threads_changes_no_bit(isa):
    random = draw(0)
    wide = linear_inputs(None, 3, 197, 96, 200, 8, "token", True, random)
    narrow = linear_inputs(4, 1, 197, 192, 14, 4, "token", False, random)
    new_scale, new_zero_point = qparams("token", 3, 197, 8, random)

    def everything():
        return (
            ops.linear_packed(*wide, torch.float32),
            ops.linear_packed(*narrow, torch.bfloat16),
            ops.linear_gelu_quantize(*wide, False, 1 / new_scale, new_zero_point, None, 8),
            ops.linear_gelu_quantize(*wide, True, 1 / new_scale, new_zero_point, None, 8),
        )

    assert_threads_change_no_bit(everything)


@needs_library
def test_what_does_not_fit_is_named():
    x, scale, zero_point, weight, weight_sum, weight_scale, _ = linear_inputs(
        None, 2, 5, 70, 20, 8, "token", False, draw(0)
    )
    rest = (weight_sum, weight_scale, None, torch.float32)
    with pytest.raises(RuntimeError, match=r"calibrated for 4 tokens, the input has 5"):
        ops.linear_packed(x, scale[:4], zero_point[:4], weight, *rest)
    with pytest.raises(RuntimeError, match=r"pack_weight"):
        ops.linear_packed(x, scale, zero_point, weight[:, :1], *rest)
    with pytest.raises(RuntimeError, match=r"zero points are int8 codes, one is 300"):
        ops.linear_packed(x, scale, zero_point.fill_(300), weight, *rest)
    with pytest.raises(RuntimeError, match=r"x has 2 directions, the weight 3"):
        ops.linear_packed(x, scale, zero_point, weight, weight_sum, weight_scale.expand(3, -1), None, torch.float32)
