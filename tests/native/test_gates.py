"""Gated sums and their codes, on every instruction set."""

import pytest
import torch
from helpers.draws import (
    CHANNELS,
    ROWS,
    SUPPRESSED,
    assert_same_codes,
    assert_threads_change_no_bit,
    draw,
    needs_library,
    qparams,
    rows_of_more,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.ops import gates

FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
KINDS = st.sampled_from(["tensor", "token"])
SEEDS = st.integers(0, 2**20)


@needs_library
@given(
    FLOATS, FLOATS, st.integers(1, 5), st.integers(0, 3), ROWS, CHANNELS, st.integers(2, 8), KINDS,
    *[st.booleans()] * 5, SEEDS,
)  # fmt: skip
@settings(max_examples=60, suppress_health_check=SUPPRESSED)
def test_codes_are_the_references(
    isa, dtype, gate_dtype, terms, images, tokens, channels, bits, kind, shared, silu, smooth, strided, cut, seed
):
    """To the last bit without SiLU, and but for ties with it."""
    random = draw(seed)
    x = torch.randn(terms, images, tokens, channels, generator=random).to(dtype)
    gate = torch.randn(terms, images, 1 if shared else tokens, channels, generator=random).to(gate_dtype)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    arguments = (silu, 20 / 2 ** (8 - bits) / scale, zero_point, inv_smooth, bits)
    codes = ops.gate_quantize(rows_of_more(x, strided), rows_of_more(gate, cut), *arguments)
    want = gates.gate_quantize(x, gate, *arguments)
    assert codes.dtype is torch.int8 and codes.is_contiguous()
    assert_same_codes(codes, want)
    assert silu or torch.equal(codes, want)


@needs_library
def test_one_gate_of_ones_is_a_quantization(isa):
    """Of numbers that are not finite, too large, or between two codes."""
    inf, largest = torch.inf, torch.finfo(torch.float32).max
    values = torch.tensor([torch.nan, inf, -inf, largest, -largest, 1e-45, -0.0, 127.5, -127.5, 0.5, 1.5])
    x, zero_point = values.repeat(1, 5, 3), torch.tensor([0, 1, -1, 127, -128], dtype=torch.int32)
    codes_of = (torch.ones(5), zero_point, None, 8)
    assert torch.equal(
        ops.gate_quantize(x[None], torch.ones(1, 1, 1, 33), False, *codes_of), ops.quantize(x, *codes_of)
    )


@needs_library
def test_the_number_of_threads_changes_no_bit(isa):
    random = draw(0)
    x, gate = (torch.randn(4, 2, 195, 200, generator=random) for _ in range(2))
    codes_of = (torch.rand(195, generator=random) * 20, torch.ones(195, dtype=torch.int32), None, 8)
    assert_threads_change_no_bit(
        lambda: (ops.gate_quantize(x, gate, True, *codes_of), ops.gate_quantize(x, gate[:, :, :1], False, *codes_of))
    )


ONE = (torch.ones(1), torch.zeros(1, dtype=torch.int32), None, 8)
X = torch.ones(2, 3, 5, 4)
WRONG = {
    "x must be": (X[0], X, False, *ONE),
    "gate must be": (X, X[0], False, *ONE),
    "has no term": (X[:0], X[:0], False, *ONE),
    "gate has another shape": (X, X[:1], False, *ONE),
    "gate has another shape.*": (X, X[:, :, :2], False, *ONE),
    "x must be float32": (X.int(), X, False, *ONE),
    "gate must be float32": (X, X.int(), False, *ONE),
    "(calibrated for 4 tokens|inv_scale has another shape)": (
        X,
        X,
        False,
        torch.ones(4),
        torch.zeros(4, dtype=torch.int32),
        None,
        8,
    ),
    "inv_smooth has another shape": (X, X, False, *ONE[:2], torch.ones(5), 8),
    "1 scales and 2 zero points": (X, X, False, ONE[0], torch.zeros(2, dtype=torch.int32), None, 8),
    "between 2 and 8, got 9": (X, X, False, *ONE[:3], 9),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("implementation", ["operator", "reference"])
def test_wrong_arguments_are_told(message, implementation):
    call = ops.gate_quantize if implementation == "operator" else ops.REFERENCES["gate_quantize"]
    with pytest.raises((RuntimeError, ValueError), match=f"ptq4vm::gate_quantize: .*{message}"):
        call(*WRONG[message])
