"""csrc/cuda/norm.cu: sums with a residual, and the codes of their norms and of those rotated."""

import pytest
import torch
from emulated.cuda_emulator import (
    DTYPES,
    SUPPRESSED,
    QParams,
    Rotation,
    Struct,
    boolean,
    float32,
    int32,
    int64,
    is_caught,
    kind,
    offset_by,
    pointer,
    poisoned,
    qparams_struct,
)
from helpers.draws import KINDS, assert_same_codes, draw, qparams
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ptq4vm.ops import norms

ROWS = st.sampled_from([0, 1, 2, 5, 9])
CHANNELS = st.sampled_from([1, 3, 8, 17, 96, 100, 192, 264, 384, 520, 768, 800, 1032, 1536, 2056, 4104])


class NormQuantize(Struct):
    _fields_ = (
        ("x", pointer),
        ("x_type", int32),
        ("residual", pointer),
        ("weight", pointer),
        ("bias", pointer),
        ("total", pointer),
        ("codes", pointer),
        ("qparams", QParams),
        ("rows", int64),
        ("channels", int64),
        ("eps", float32),
        ("rms", boolean),
        ("rotation", pointer),
    )


def norm_quantize(library, x, residual, weight, bias, eps, rms, rotated, inv_scale, zero_point, inv_smooth, bits):
    total = poisoned(*x.shape) if residual is not None else torch.empty(0)
    codes = poisoned(*x.shape, dtype=torch.int8)
    library.run(
        NormQuantize(
            x=x,
            x_type=kind(x),
            residual=residual,
            weight=weight,
            bias=bias,
            total=total if residual is not None else None,
            codes=codes,
            qparams=qparams_struct(inv_scale, zero_point, inv_smooth, bits),
            rows=x.shape[:-1].numel(),
            channels=x.shape[-1],
            eps=eps,
            rms=rms,
            rotation=Rotation.of(x.shape[-1]) if rotated else None,
        )
    )
    return total, codes


def assert_same(library, *arguments):
    total, codes = norm_quantize(library, *arguments)
    want, want_codes = norms.norm_quantize(*arguments)
    assert torch.equal(total, want)
    assert_same_codes(codes, want_codes)


@DTYPES
@given(
    st.integers(1, 2),
    ROWS,
    CHANNELS,
    st.integers(2, 8),
    KINDS,
    *[st.booleans()] * 3,
    st.integers(0, 7),
    st.integers(0, 1),
    st.integers(0, 2**20),
)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
@example(1, 5, 192, 8, "token", True, True, True, 7, 0, 0)
@example(1, 5, 2056, 8, "token", False, True, False, 7, 0, 0)
def test_sums_and_codes_of_norms_are_the_references(
    emulated, dtype, images, tokens, channels, bits, kind_of, rms, rotated, add, optional, offset, seed
):
    random = draw(seed)
    scale, zero_point = qparams(kind_of, images, tokens, bits, random)
    scale = scale * 2 ** (8 - bits) / 20

    def numbers(*shape):
        return torch.randn(shape, generator=random)

    x = (numbers(images, tokens, channels) * 10.0 ** (seed % 5 - 2) + seed % 3).to(dtype)
    residual = numbers(images, tokens, channels) * 10.0 ** (seed % 5 - 2) if add else None
    weight = numbers(channels) if optional & 1 else None
    bias = numbers(channels) if optional & 2 and not rms else None
    inv_smooth = torch.rand(channels, generator=random) if optional & 4 else None
    qparams_of = (1 / scale, zero_point, inv_smooth, bits)
    assert_same(emulated("norm"), offset_by(offset, x), residual, weight, bias, 1e-5, rms, rotated, *qparams_of)


MISTAKES = [
    ("norm.cu", "  if (!ROTATED) return;\n  Team<WARPS>::sync();", "  if (!ROTATED) return;"),
    ("norm.cu", "value[i] += other[i]", "value[i] -= other[i]"),
    ("norm.cu", "variance + q.eps", "variance"),
    ("norm.cu", "q.rms ? 0.0f : mean_of", "!q.rms ? 0.0f : mean_of"),
    ("norm.cu", "kept_[item][i] = value[i]", "kept_[0][i] = value[i]"),
    ("norm.cu", "if (total) store<N>(total + d, value)", "if (total && d) store<N>(total + d, value)"),
    ("norm.cu", "load<N>(q.bias + d, bias)", "load<N>(q.bias, bias)"),
    ("device.cuh", "total += scratch[i];\n  __syncthreads();", "total += scratch[i];"),
    ("device.cuh", "= value;\n  __syncthreads();", "= value;"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, *MISTAKES])
def test_mistakes_are_seen(emulated, change):
    library = emulated("norm", change=change)

    def check():
        for channels in (384, 1536, 1537):
            for rms in (False, True):
                x, residual = (torch.randn(5, channels, generator=draw(i)) / 100 for i in range(2))
                weight, bias = (torch.randn(channels, generator=draw(i)) / 100 for i in range(2))
                zero_point = torch.arange(5, dtype=torch.int32)
                arguments = (torch.full((5,), 4000.0), zero_point, torch.rand(channels), 8)
                for rotated in (False, True):
                    own_bias = None if rms else bias
                    assert_same(library, x, residual, weight, own_bias, 1e-5, rms, rotated, *arguments)

    assert is_caught(check) == (change is not None)
