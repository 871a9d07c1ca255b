"""csrc/cuda/scan.cu and directional_scan.cu under the emulator, against the references in float64."""

import ctypes
from functools import partial

import pytest
import torch
from emulated.cuda_emulator import (
    DTYPES,
    SUPPRESSED,
    Library,
    QParams,
    Rows,
    Struct,
    boolean,
    float32,
    int32,
    int64,
    is_caught,
    kind,
    pointer,
    poisoned,
    qparams_struct,
    rows_of,
)
from helpers.draws import directional_inputs, draw, exact_directional, part, relative, scan_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq4vm.ops import directional_scans, quantization, scans

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
CHANNELS = st.sampled_from([1, 15, 32, 33, 40, 72])
STATES = st.sampled_from([1, 1, 2, 3, 16, 16, 17])
SEEDS = st.integers(0, 2**20)
MAX_IN_SHARED = 256
"""Tokens whose sums over directions lie in shared memory."""


class Scan(Struct):
    _fields_ = (
        *((name, Rows) for name in ("u", "delta", "B", "C", "z")),
        *((name, pointer) for name in ("A", "D", "delta_bias", "y")),
        ("y_type", int32),
        *((name, int64) for name in ("batch", "tokens", "channels", "states")),
        ("softplus", boolean),
    )


class DirectionalScan(Struct):
    _fields_ = (
        ("u", Rows),
        ("z", Rows),
        ("u_direction", int64),
        ("projected", pointer),
        ("dt_qparams", QParams),
        ("dt_scale", pointer),
        ("dt_weight", pointer),
        ("packed", boolean),
        *((name, pointer) for name in ("dt_weight_sum", "dt_weight_scale", "dt_bias", "A", "D", "order")),
        *((name, int64) for name in ("directions", "batch", "tokens", "length", "channels", "rank", "states")),
        ("factor", float32),
        ("merge", boolean),
        ("y", pointer),
        ("y_type", int32),
        ("codes", pointer),
        ("qparams", QParams),
        ("panel", int64),
        ("sums", pointer),
    )


def selective_scan(library: Library, u, delta, A, B, C, D, z, bias, softplus) -> Tensor:
    y = poisoned(*u.shape, dtype=u.dtype)
    strided = {"u": rows_of(u), "delta": rows_of(delta), "B": rows_of(B), "C": rows_of(C), "z": rows_of(z)}
    sizes = {"batch": u.shape[0], "tokens": u.shape[1], "channels": u.shape[2], "states": A.shape[1]}
    library.run(Scan(**strided, A=A, D=D, delta_bias=bias, y=y, y_type=kind(u), **sizes, softplus=softplus))
    return y


def directional_scan(library: Library, *inputs, merge=True, factor=0.5, codes_of=None) -> Tensor:
    u, projected, inv_scale, scale, zero, smooth, bits, weight, weight_sum, weight_scale, bias, A, D, z, order = inputs
    (directions, length), states = order.shape, A.shape[-1]
    _, images, tokens, channels = u.shape
    shape = (images, tokens, channels) if merge else (directions, images, tokens, channels)
    out = poisoned(*shape, dtype=u.dtype if codes_of is None else torch.int8)
    s = DirectionalScan(
        u=rows_of(u),
        z=rows_of(z),
        u_direction=u.stride(0) if len(u) > 1 else 0,
        projected=projected,
        dt_qparams=qparams_struct(inv_scale, zero, smooth, bits, directions),
        dt_scale=scale,
        dt_weight=weight,
        packed=weight.dtype == torch.uint8,
        dt_weight_sum=weight_sum,
        dt_weight_scale=weight_scale,
        dt_bias=bias,
        A=A,
        D=D,
        order=order,
        directions=directions,
        batch=images,
        tokens=tokens,
        length=length,
        channels=channels,
        rank=projected.shape[-1] - 2 * states,
        states=states,
        factor=factor,
        merge=merge,
        y=None if codes_of else out,
        y_type=kind(u),
        codes=out if codes_of else None,
        qparams=qparams_struct(*codes_of) if codes_of else QParams(),
    )
    count = library._library._ZN6ptq4vm4cuda21directional_scan_sumsERKNS_15DirectionalScanE
    count.restype = ctypes.c_int64
    sums = poisoned(count(ctypes.byref(s)))
    s.sums = sums.data_ptr() if len(sums) else None
    library.run(s)
    return out


@DTYPES
@given(st.integers(0, 2), st.sampled_from([0, 1, 7, 8, 17]), CHANNELS, STATES, *[st.booleans()] * 2, SEEDS)
@settings(max_examples=15, suppress_health_check=SUPPRESSED)
def test_the_scan_is_the_references(emulated, dtype, images, tokens, channels, states, optional, softplus, seed):
    random = draw(seed)
    u, delta, A, B, C, D, z, bias = scan_inputs(images, tokens, channels, states, optional, random)
    delta = delta if softplus else delta.abs() / 9
    u, delta, B, C, z = (None if x is None else part(x, dtype, random) for x in (u, delta, B, C, z))
    inputs = (u, delta, A, B, C, D, z, bias if softplus else None)
    exact = scans.selective_scan(*(None if x is None else x.double() for x in inputs), softplus)
    ours = selective_scan(emulated("scan"), *inputs, softplus)
    assert relative(ours, exact) <= ROUNDING[dtype]


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("rate", [1e-5, 1e-3, 1e-1])
def test_slow_decays_stay_exact_over_many_tokens(emulated, rate, states):
    random = draw(0)
    u, delta, A, B, C, *_ = scan_inputs(1, 3136, 2, states, False, random)
    delta = torch.rand(delta.shape, generator=random)
    A = -rate * torch.rand(A.shape, generator=random)
    inputs = (u.abs(), delta, A, B.abs(), C.abs(), None, None, None)
    exact = scans.selective_scan(*(None if x is None else x.double() for x in inputs), False)
    ours = selective_scan(emulated("scan"), *inputs, False)
    assert float(((ours - exact).abs() / exact.abs().amax(1, keepdim=True)).max()) <= 1e-5


DIRECTIONAL = (
    st.sampled_from([1, 2, 3, 4, 5]),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([1, 2, 7, 8, 9, 17, 49]),
    CHANNELS,
    st.sampled_from([1, 3, 6, 16, 70]),
    STATES,
    st.booleans(),
    st.sampled_from([4, 6, 8]),
    st.sampled_from([0, 1, 9, 40]),
)


@DTYPES
@given(st.tuples(*DIRECTIONAL), st.booleans(), SEEDS)
@settings(max_examples=20, suppress_health_check=SUPPRESSED)
def test_the_directional_scan_is_the_references(emulated, dtype, sizes, merge, seed):
    inputs = directional_inputs(draw(seed), *sizes, dtype)
    ours = directional_scan(emulated("directional_scan"), *inputs, merge=merge)
    assert relative(ours, exact_directional(inputs, merge, 0.5)) <= ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize("states", [1, 2, 16])
@pytest.mark.parametrize("tokens", [MAX_IN_SHARED, MAX_IN_SHARED + 1])
def test_long_sequences_are_summed_in_the_memory_that_they_are_given(emulated, dtype, states, tokens):
    inputs = directional_inputs(draw(0), 3, False, 1, tokens, 20, 5, states, True, 8, 1, dtype)
    ours = directional_scan(emulated("directional_scan"), *inputs)
    assert relative(ours, exact_directional(inputs, True, 0.5)) <= ROUNDING[dtype]


@DTYPES
@given(st.tuples(*DIRECTIONAL), st.booleans(), st.booleans(), st.integers(2, 8), SEEDS)
@settings(max_examples=15, suppress_health_check=SUPPRESSED)
def test_the_codes_of_the_scan_are_those_of_its_outputs(emulated, dtype, sizes, per_token, smooth, bits, seed):
    """Exactly, as the outputs are the same: quantizing is bit for bit the reference's."""
    random, library = draw(seed), emulated("directional_scan")
    inputs = directional_inputs(random, *sizes, dtype)
    tokens, channels = inputs[0].shape[2:]
    inv_scale = torch.rand(tokens if per_token else 1, generator=random) * 2**bits / 8
    zero_point = torch.randint(-2, 2, inv_scale.shape, generator=random, dtype=torch.int32)
    qparams = (inv_scale, zero_point, torch.rand(channels, generator=random) if smooth else None, bits)
    wide = (inputs[0].float(), *inputs[1:])
    want = quantization.quantize(directional_scan(library, *wide), *qparams)
    assert torch.equal(directional_scan(library, *inputs, codes_of=qparams), want)


@pytest.mark.parametrize("states", [1, 16])
def test_hardly_a_code_differs_from_the_references(emulated, states):
    inputs = directional_inputs(draw(3), 2, False, 1, 49, 96, 12, states, True, 8, 0, torch.float32)
    y = directional_scans.directional_scan(*inputs, True, 0.5)
    qparams = (127 / y.abs().amax((0, 2)), torch.zeros(49, dtype=torch.int32), None, 8)
    ours = directional_scan(emulated("directional_scan"), *inputs, codes_of=qparams).int()
    off = (ours - directional_scans.directional_scan_quantize(*inputs, 0.5, *qparams).int()).abs()
    assert off.max() <= 1 and off.bool().float().mean() < 1e-3


def test_tokens_that_no_direction_names_are_zeros(emulated):
    for states in (1, 16):
        inputs = list(directional_inputs(draw(4), 2, False, 1, 9, 5, 3, states, True, 8, 0, torch.float32))
        inputs[-1][:, 3:6] = -1
        for merge in (True, False):
            ours = directional_scan(emulated("directional_scan"), *inputs, merge=merge)
            assert relative(ours, exact_directional(inputs, merge, 0.5)) <= 1e-5


MISTAKES = [  # and the numbers of states that show them
    ("scan.cu", "__syncthreads();\n    float raw", "float raw", (3,)),
    ("scan.cu", "n < count ? read(s.B, image, token, n)", "n < count ? read(s.C, image, token, n)", (1, 16)),
    ("scan.cuh", "h(memory + threadIdx.y * blockDim.x", "h(memory + threadIdx.x * blockDim.y", (3,)),
    ("directional_scan.cu", "__syncwarp();\n      channel", "channel", (3, 16)),
    ("directional_scan.cu", "        __syncthreads();\n", "", (3, 16)),  # between additions, and before sums are read
    ("directional_scan.cu", "    __syncthreads();\n  }\n", "  }\n", (16,)),  # after sums are cleared
    ("directional_scan.cu", "__syncthreads();\n      channel", "channel", (1,)),
    ("directional_scan.cu", "__syncthreads();\n      float before", "float before", (1,)),
    ("directional_scan.cu", "      __syncthreads();\n    }\n  }", "    }\n  }", (1,)),  # before the next chunk
    ("directional_scan.cu", "fmaf(before, weight[t], y[t])", "y[t]", (1,)),
    ("directional_scan.cu", "decay[group][lane], last[group][lane]", "decay[group][lane], last[0][lane]", (1,)),
    ("scan.cuh", "qparams(s.dt_qparams, at, direction)", "qparams(s.dt_qparams, at)", (1, 16)),
    ("scan.cuh", "shift = lane < 8 ? 0 : 4", "shift = lane < 8 ? 4 : 0", (1, 16)),
    ("scan.cuh", "sums[t] = -chunk.zero_point[first + t] * weight_sum", "sums[t] = 0", (1, 16)),
]


def check_scan(library: Library, states: int) -> None:
    inputs = scan_inputs(1, 17, 5, states, True, draw(0))
    ours = selective_scan(library, *inputs, True)
    assert relative(ours, scans.selective_scan(*(x.double() for x in inputs), True)) <= 1e-5


def check_directional(library: Library, states: int) -> None:
    inputs = directional_inputs(draw(0), 3, False, 1, 96, 24, 5, states, True, 4, 0, torch.float32)
    assert relative(directional_scan(library, *inputs), exact_directional(inputs, True, 0.5)) <= 1e-5


CONTROLS = [("scan.cu", None, None, (1, 3, 16)), ("directional_scan.cu", None, None, (1, 3, 16))]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "text", "other", "states"), [*CONTROLS, *MISTAKES])
def test_mistakes_are_seen(emulated, file, text, other, states):
    name, check = ("scan", check_scan) if file == "scan.cu" else ("directional_scan", check_directional)
    library = emulated(name, change=text and (file, text, other))
    for count in states:
        assert is_caught(partial(check, library, count)) == (text is not None), count
