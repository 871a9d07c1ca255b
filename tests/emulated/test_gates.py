"""csrc/cuda/quantize.cu: gated sums and their codes."""

import pytest
import torch
from emulated.cuda_emulator import (
    DTYPES,
    SUPPRESSED,
    QParams,
    Rows,
    Struct,
    boolean,
    int64,
    is_caught,
    offset_by,
    pointer,
    poisoned,
    qparams_struct,
    rows_of,
)
from helpers.draws import assert_same_codes, draw, qparams, rows_of_more
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ptq4vm.ops import gates


class GateQuantize(Struct):
    _fields_ = (
        ("x", Rows),
        ("gate", Rows),
        ("x_term", int64),
        ("gate_term", int64),
        ("silu", boolean),
        ("qparams", QParams),
        ("codes", pointer),
        ("terms", int64),
        ("batch", int64),
        ("tokens", int64),
        ("channels", int64),
    )


def gate_quantize(library, x, gate, silu, *codes_of):
    terms, batch, tokens, channels = x.shape
    codes, rows = poisoned(batch, tokens, channels, dtype=torch.int8), rows_of(gate)
    if gate.shape[2] == 1:
        rows.row = 0
    library.run(
        GateQuantize(
            x=rows_of(x),
            gate=rows,
            x_term=x.stride(0),
            gate_term=gate.stride(0),
            silu=silu,
            qparams=qparams_struct(*codes_of),
            codes=codes,
            terms=terms,
            batch=batch,
            tokens=tokens,
            channels=channels,
        )
    )
    return codes


@DTYPES
@given(
    st.integers(1, 4),
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, 5, 9]),
    st.sampled_from([1, 3, 8, 17, 96, 264, 520]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(2, 8),
    *[st.booleans()] * 5,
    st.integers(0, 1),
    st.integers(0, 2**20),
)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
@example(4, 2, 5, 96, torch.float32, 8, True, False, True, True, False, 0, 0)
@example(1, 2, 9, 264, torch.bfloat16, 8, False, True, True, True, True, 0, 0)
@example(1, 2, 9, 264, torch.float32, 8, False, True, True, True, True, 1, 0)
def test_codes_are_the_references(
    emulated, dtype, terms, images, tokens, channels, other, bits, shared, silu, per_token, smooth, cut, offset, seed
):
    random = draw(seed)
    x = torch.randn(terms, images, tokens, channels, generator=random).to(dtype)
    gate = torch.randn(terms, images, 1 if shared else tokens, channels, generator=random).to(other)
    scale, zero_point = qparams("token" if per_token else "tensor", images, tokens, bits, random)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    codes_of = (silu, 20 / 2 ** (8 - bits) / scale, zero_point, inv_smooth, bits)
    codes = gate_quantize(emulated("quantize"), offset_by(offset, x), rows_of_more(gate, cut), *codes_of)
    want = gates.gate_quantize(x, gate, *codes_of)
    assert torch.equal(codes, want) or (silu and assert_same_codes(codes, want) is None)


MISTAKES = [
    ("quantize.cu", "gate + k * q.gate_term + d", "gate + d"),
    ("quantize.cu", "x + k * q.x_term + d", "x + d"),
    ("quantize.cu", "__fadd_rn(total[i], __fmul_rn", "__fadd_rn(0.0f * total[i], __fmul_rn"),
    ("quantize.cu", "q.silu ? silu(factor[i]) : factor[i]", "factor[i]"),
    ("quantize.cu", "image * q.gate.image + token * q.gate.row", "image * q.gate.image"),
    ("quantize.cu", "image * q.x.image + token * q.x.row", "token * q.x.row"),
    ("quantize.cu", "(row - token) / q.tokens", "token"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, *MISTAKES])
def test_mistakes_are_seen(emulated, change):
    library = emulated("quantize", change=change)

    def check():
        x, gate = (torch.randn(3, 2, 5, 96, generator=draw(i)) for i in range(2))
        codes_of = (torch.full((5,), 20.0), torch.arange(5, dtype=torch.int32), torch.rand(96, generator=draw(2)), 8)
        for silu, gates_of in ((False, gate), (True, gate), (False, gate[:, :, :1])):
            want = gates.gate_quantize(x, gates_of, silu, *codes_of)
            assert_same_codes(gate_quantize(library, x, gates_of, silu, *codes_of), want)

    assert is_caught(check) == (change is not None)
