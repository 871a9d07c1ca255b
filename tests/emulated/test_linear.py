"""csrc/cuda/linear_*.cu on the CPU, which give the reference's results: CUTLASS's whole kernels, but for the loads and
multiplications of linear_s8_sm90, which are plain loops there."""

import ctypes
import subprocess
from typing import NamedTuple

import pytest
import torch
from emulated.cuda_cutlass import LinearProblem, guarded, host_flags, run
from emulated.cuda_emulator import (
    COMPILER,
    SOURCES,
    Library,
    compile_emulated,
    is_caught,
    kind,
    poisoned,
    qparams_struct,
)
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from ptq4vm.ops import layouts
from ptq4vm.ops import linears as linear_ops

SM90 = pytest.param("linear_s8_sm90", marks=pytest.mark.slow)
KERNELS = pytest.mark.parametrize("kernel", ["linear_s8", "linear_s4", SM90])
TOKENS = st.sampled_from([1, 5, 17, 50])
CHANNELS = st.sampled_from([0, 1, 12, 24, 33, 48, 64, 96, 200])
FEATURES = st.sampled_from([1, 7, 8, 24, 44, 56, 64, 65, 80, 130, 136])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
KINDS = st.sampled_from(["tensor", "token", "image"])
SEEDS = st.integers(0, 2**20)
DRAWN = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])

TABLE = "    {129, 1 << 22, Tile::rows128_features128},\n    {65, 1 << 18, Tile::rows64_features128},\n"
SMALL = ("tiles.h", TABLE, TABLE.replace("1 << 22", "4000").replace("1 << 18", "2000"))
SMALL_SM90 = ("tiles.h", "{65, 1 << 22,", "{65, 4000,")
"""Sizes that take minutes here have the largest tiles; so all are reached."""


@pytest.fixture(scope="session")
def linears(tmp_path_factory):
    """linears("linear_s4") is linear_s4.cu, with `change` a wrong one."""
    flags, folder, made = host_flags(), tmp_path_factory.mktemp("linear"), {}

    def build(kernel: str, change=SMALL):
        if change is SMALL and kernel == "linear_s8_sm90":
            change = SMALL_SM90
        if (kernel, change) not in made:
            made[kernel, change] = Kernel(compile_emulated(folder, kernel, change=change, flags=flags), kernel)
        return made[kernel, change]

    return build


class Kernel(NamedTuple):
    library: Library
    name: str

    @property
    def bits(self) -> int:
        return 4 if self.name == "linear_s4" else 8

    def __call__(self, problem: LinearProblem) -> bool:
        return run(self.library, self.name, problem)


class Linear:
    """A drawn linear, or `directions` stacked ones. Memory that kernels see ends `offset` numbers before a guard."""

    def __init__(self, bits, images, tokens, channels, features, kind_of, seed, directions=None, bias=True, offset=0):
        self.bits, self.kind_of, self.features, self.offset = bits, kind_of, features, offset
        self.random = torch.Generator().manual_seed(seed)
        self.stacked = () if directions is None else (directions,)
        self.shape = (*self.stacked, images, tokens)
        half = 2 ** (bits - 1)
        self.x = self.integers(-half, half, *self.shape, channels).to(torch.int8)
        self.weight = self.integers(1 - half, half, *self.stacked, features, channels).to(torch.int8)
        self.x_scale, self.zero_point = self.qparams(bits)
        self.weight_scale = self.scales(*self.stacked, features)
        self.bias = torch.randn(*self.stacked, features, generator=self.random) * 50 if bias else None

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.random, dtype=torch.int32)

    def scales(self, *shape):
        return torch.rand(shape, generator=self.random) + 0.01

    def qparams(self, bits):
        images, tokens = self.shape[-2:]
        shape = (*self.stacked, *{"tensor": (1,), "token": (tokens,), "image": (images, tokens)}[self.kind_of])
        half = 2 ** (bits - 1)
        return self.scales(*shape), self.integers(-half, half, *shape)

    def arguments(self):
        """Arguments of linear_packed."""
        packed, sums = layouts.pack_weight(self.weight, self.bits), self.weight.sum(-1, dtype=torch.int32)
        return self.x, self.x_scale, self.zero_point, packed, sums, self.weight_scale, self.bias

    def run(self, kernel, **outputs):
        short = -self.x.shape[-1] % (16 if self.bits == 8 else 32)
        x, weight = pad(self.x, (0, short), value=5), pad(self.weight, (0, short))
        channels = x.shape[-1]
        if self.bits == 4:
            x, weight = layouts.pack_int4(x), layouts.pack_int4(weight)
        problem = LinearProblem(
            x=guarded(x),
            x_scale=guarded(self.x_scale, self.offset),
            zero_point=guarded(self.zero_point, self.offset),
            weight=guarded(weight),
            weight_sum=guarded(self.weight.sum(-1, dtype=torch.int32), self.offset),
            weight_scale=guarded(self.weight_scale, self.offset),
            bias=None if self.bias is None else guarded(self.bias, self.offset),
            directions=self.stacked[0] if self.stacked else 1,
            rows=self.shape[-2] * self.shape[-1],
            scales=self.x_scale[0].numel() if self.stacked else self.x_scale.numel(),
            channels=channels,
            features=self.features,
            **outputs,
        )
        assert kernel(problem)

    def y(self, kernel, dtype):
        y = guarded(poisoned(*self.shape, self.features, dtype=dtype), self.offset)
        self.run(kernel, y=y, y_type=kind(y))
        return y

    def codes(self, kernel, inv_scale, zero_point, inv_smooth, bits, packed=False, extra=0):
        """Rows of bytes, `extra` of them behind the codes."""
        row = extra + ((self.features + 1) // 2 if packed else self.features)
        codes = guarded(poisoned(*self.shape, row, dtype=torch.int8).view(torch.uint8), self.offset)
        smooth = None if inv_smooth is None else guarded(inv_smooth, self.offset)
        qparams = qparams_struct(inv_scale, zero_point, smooth, bits)
        self.run(kernel, codes=codes, nibbles=packed, codes_row=row, qparams=qparams)
        return codes


def is_right(linear, kernel, dtype):
    return torch.equal(linear.y(kernel, dtype), linear_ops.linear_packed(*linear.arguments(), dtype))


@KERNELS
@given(
    drawn=st.tuples(
        st.integers(0, 3),
        TOKENS,
        CHANNELS,
        FEATURES,
        KINDS,
        SEEDS,
        st.sampled_from([None, 1, 2, 3]),
        st.booleans(),
        st.integers(0, 1),
        DTYPES,
    )
)
@example(drawn=(3, 50, 200, 136, "token", 1, 2, True, 0, torch.float16))
@example(drawn=(3, 50, 96, 130, "image", 2, None, True, 0, torch.bfloat16))
@example(drawn=(3, 17, 96, 80, "token", 3, 2, False, 0, torch.float32))
@DRAWN
def test_results_are_the_references(linears, kernel, drawn):
    *of, dtype = drawn
    assume(of[2] > 0 or kernel != "linear_s8_sm90")
    kernel = linears(kernel)
    assert is_right(Linear(kernel.bits, *of), kernel, dtype)


@pytest.mark.parametrize("kernel", ["linear_s8", SM90])
def test_sums_as_large_as_they_get_are_exact(linears, kernel):
    """|acc| is beyond what float32 holds exactly, and close to int32's end after the correction."""
    linear = Linear(8, 1, 3, 4096, 8, "token", 0)
    linear.x.fill_(-128), linear.weight.fill_(127), linear.zero_point.fill_(127)
    linear.x_scale.fill_(2.0**-10), linear.weight_scale.fill_(2.0**-10)
    assert is_right(linear, linears(kernel), torch.float32)


def gelu_qparams(linear, bits, smooth):
    linear.x_scale, linear.weight_scale = linear.x_scale / 64, linear.weight_scale / max(1, linear.x.shape[-1])
    scale, zero_point = linear.qparams(bits)
    return 1 / scale, zero_point, linear.scales(linear.features) if smooth else None, bits


@KERNELS
@given(
    drawn=st.tuples(
        st.integers(0, 3),
        TOKENS,
        CHANNELS,
        FEATURES,
        KINDS,
        SEEDS,
        st.none(),
        st.booleans(),
        st.integers(0, 1),
        st.booleans(),
        st.integers(2, 8),
        st.integers(0, 9),
    )
)
@example(drawn=(3, 50, 96, 136, "token", 1, None, True, 0, True, 8, 0))
@example(drawn=(3, 50, 96, 136, "token", 1, None, True, 0, True, 4, 4))
@example(drawn=(2, 50, 96, 128, "image", 1, None, True, 0, True, 4, 0))
@DRAWN
def test_codes_of_the_gelu_are_the_references(linears, kernel, drawn):
    *of, smooth, new_bits, extra = drawn
    assume(of[2] > 0 or kernel != "linear_s8_sm90")
    kernel = linears(kernel)
    linear = Linear(kernel.bits, *of)
    new = gelu_qparams(linear, new_bits, smooth)
    wanted = linear_ops.linear_gelu_quantize(*linear.arguments(), False, *new)
    whole = linear.codes(kernel, *new, extra=extra)
    codes, behind = whole.split([linear.features, extra], -1)
    apart = (codes.view(torch.int8).int() - wanted.int()).abs()
    assert (apart <= 1).all() and apart.sum() <= apart.numel() / 1000 and torch.equal(behind, untouched(behind))
    if new_bits <= 4:
        packed = linear.codes(kernel, *new, packed=True, extra=extra)
        pairs, behind = packed.split([packed.shape[-1] - extra, extra], -1)
        assert torch.equal(pairs, layouts.pack_int4(codes.view(torch.int8))) and torch.equal(behind, untouched(behind))


def untouched(bytes_: Tensor) -> Tensor:
    return poisoned(*bytes_.shape, dtype=torch.int8).view(torch.uint8)


@pytest.mark.parametrize("kernel", ["linear_s8", SM90])
def test_what_does_not_fit_one_launch_is_refused(linears, kernel):
    empty = torch.empty(1, dtype=torch.uint8)
    many = [{"rows": 2**31}, {"features": 2**31}, {"directions": 65536}, {"codes": empty, "directions": 2}]
    if kernel == "linear_s8_sm90":
        many += [{"channels": 0}, {"rows": 2**26, "channels": 2**14}]
    for sizes in many:
        problem = LinearProblem(**{"rows": 1, "features": 1, "channels": 16, "directions": 1, "scales": 1, **sizes})
        assert not linears(kernel)(problem)


KERNELS_THAT_TELL = """
#include <cstdlib>
#include "linear.h"
namespace ptq4vm::cuda {
static const char* ran;
bool linear_s8(const LinearProblem&, Stream) { return ran = "s8", true; }
bool linear_s4(const LinearProblem&, Stream) { return ran = "s4", true; }
bool linear_s8_sm90(const LinearProblem& p, Stream) { return p.channels > 0 && (ran = "sm90", true); }
extern "C" const char* chosen(bool nibbles, int capability, int channels) {
  LinearProblem p{};
  p.channels = channels, ran = "refused by two";
  return linear(p, nibbles, capability, nullptr) ? ran : "none";
}
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.parametrize("built", ["", "-DPTQ4VM_SM90", "-DPTQ4VM_NO_S4"])
def test_every_gpu_has_its_kernel(tmp_path, built):
    (tmp_path / "kernels.cpp").write_text(KERNELS_THAT_TELL)
    target = tmp_path / "linear.so"
    command = [COMPILER, "-std=c++17", "-shared", "-fPIC", f"-I{SOURCES}", *filter(None, [built])]
    subprocess.run([*command, SOURCES / "linear.cpp", tmp_path / "kernels.cpp", "-o", target], check=True)
    chosen = ctypes.CDLL(str(target)).chosen
    chosen.restype = ctypes.c_char_p
    hopper = b"sm90" if built == "-DPTQ4VM_SM90" else b"s8"
    assert [chosen(False, gpu, 64) for gpu in (80, 86, 89, 90, 100, 120)] == [b"s8"] * 3 + [hopper] + [b"s8"] * 2
    assert chosen(False, 90, 0) == b"s8"
    nibbles = b"none" if built == "-DPTQ4VM_NO_S4" else b"s4"
    assert [chosen(True, gpu, 64) for gpu in (80, 86, 89, 90, 120)] == [nibbles] * 3 + [b"none"] * 2


MISTAKES = [
    ("epilogue.cuh", "acc[i] - r.zero_point", "acc[i] + r.zero_point"),
    ("epilogue.cuh", "__fadd_rn(scaled, c.bias", "(1e-7f * scaled + scaled + c.bias"),
    ("epilogue.cuh", "p.features % WIDTH == 0 && (!CODES", "(!CODES"),
    ("epilogue.cuh", "direction * p.scales + row %", "row %"),
    ("epilogue.cuh", "const int64_t at = direction * p.features + column;", "const int64_t at = column;"),
    ("epilogue.cuh", "const int64_t index = direction * p.rows + row;", "const int64_t index = row;"),
    ("epilogue.cuh", "if (i < count) to[i] = from.values[i];", "to[i] = from.values[i];"),
    ("epilogue.cuh", "(codes[2 * i] & 15) | high << 4", "(high & 15) | codes[2 * i] << 4"),
    ("epilogue.cuh", "2 * i + 1 < count ? codes[2 * i + 1] : 0", "codes[2 * i + 1]"),
    ("epilogue.cuh", "p.nibbles ? column / 2 : column", "column"),
    ("epilogue.cuh", "index * p.codes_row", "index * p.features"),
    ("epilogue.cuh", "__fmul_rn(gelu(value[i]), c.inv_smooth.values[i])", "gelu(value[i])"),
    ("visitor.cuh", "ThreadMap::Shape::kRow * step", "step"),
    ("visitor.cuh", "row = epilogue.row(direction, row_of(step))", "row = epilogue.row(direction, first_row)"),
    ("visitor.cuh", "epilogue.p.rows && column < epilogue.p.features", "epilogue.p.rows"),
    ("gemm.cuh", "tile.k() * p.rows * row_bytes", "tile.k() * p.rows * p.channels * 2"),
    ("gemm.cuh", "tile.k() * p.features * row_bytes", "0"),
    ("gemm.cuh", "if (channels > 0) mma(", "mma("),
]


MISTAKES_SM90 = [
    ("epilogue_sm90.cuh", "return first_row + static_cast", "return static_cast"),
    ("epilogue_sm90.cuh", "+ thread % 4 * WIDTH", ""),
    ("epilogue_sm90.cuh", "get<1>(at) * get<1>(tile) +", ""),
    ("epilogue_sm90.cuh", "bit < 4", "bit < 2"),
    ("epilogue_sm90.cuh", "low = upper ? theirs : low;", ""),
    ("epilogue_sm90.cuh", "make_coord(0, half, 0)", "make_coord(0, 0, 0)"),
    ("epilogue_sm90.cuh", "acc(make_coord(j % 2, i % 2, eight + j / 2)", "acc(make_coord(j % 2, i % 2, j / 2)"),
    ("epilogue_sm90.cuh", "columns(direction, column + 4 * WIDTH)", "columns(direction, column)"),
    ("epilogue_sm90.cuh", "epilogue.p.rows && column < epilogue.p.features", "epilogue.p.rows"),
    ("epilogue_sm90.cuh", "epilogue.p.rows && column < epilogue.p.features", "epilogue.p.rows + 1"),
    ("epilogue_sm90.cuh", "direction = get<3>(at)", "direction = 0"),
    ("linear_s8_sm90.cu", "{p.channels, {}, p.rows * p.channels}", "{p.channels, {}, 0}"),
    ("linear_s8_sm90.cu", "{p.channels, {}, p.features * p.channels}", "{p.channels, {}, 0}"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "change"),
    [("linear_s4", change) for change in [None, *MISTAKES]]
    + [("linear_s8_sm90", change) for change in [None, *MISTAKES_SM90]],
)
def test_mistakes_are_seen(linears, kernel, change):
    kernel = linears(kernel, change)
    bits = kernel.bits

    def check():
        for features in (8, 44, 65, 130):
            assert is_right(Linear(bits, 2, 50, 96, features, "token", 1, 2), kernel, torch.float32)
            linear = Linear(bits, 2, 50, 96, features + features % 8 // 5, "token", 1)
            new = gelu_qparams(linear, 4, True)
            wanted = linear_ops.linear_gelu_quantize(*linear.arguments(), False, *new)
            for packed in (False, True):
                codes = linear.codes(kernel, *new, packed=packed, extra=2)[..., :-2]
                assert torch.equal(codes, layouts.pack_int4(wanted) if packed else wanted.view(torch.uint8))
        if kernel.name == "linear_s4":
            assert is_right(Linear(bits, 1, 5, 0, 8, "token", 1), kernel, torch.float32)

    assert is_caught(check) == (change is not None)
