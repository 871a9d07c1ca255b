"""csrc/cuda/linear_s8.cu and linear_s4.cu: CUTLASS's whole kernels on the CPU, which give the reference's results."""

import pytest
import torch
from cuda_cutlass import LinearProblem, guarded, host_flags, run
from cuda_emulator import compile_emulated, is_caught, kind, poisoned, qparams_struct
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from ptq4vm import fused, reference

BITS = pytest.mark.parametrize("bits", [8, 4])
TOKENS = st.sampled_from([1, 5, 17, 50])
CHANNELS = st.sampled_from([0, 1, 12, 24, 33, 48, 64, 96, 200])
FEATURES = st.sampled_from([1, 7, 8, 24, 44, 56, 64, 65, 80, 130, 136])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
KINDS = st.sampled_from(["tensor", "token", "image"])
SEEDS = st.integers(0, 2**20)
DRAWN = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

TABLE = "    {129, 1 << 22, Tile::rows128_features128},\n    {65, 1 << 18, Tile::rows64_features128},\n"
SMALL = ("tiles.h", TABLE, TABLE.replace("1 << 22", "4000").replace("1 << 18", "2000"))
"""Sizes that take minutes here have the largest tiles; so all three are reached."""


@pytest.fixture(scope="session")
def linears(tmp_path_factory):
    """linears(4) is linear_s4.cu; linears(8, change) a wrong linear_s8.cu."""
    flags, folder, made = host_flags(), tmp_path_factory.mktemp("linear"), {}

    def build(bits: int, change=SMALL):
        if (bits, change) not in made:
            made[bits, change] = compile_emulated(folder, f"linear_s{bits}", change=change, flags=flags)
        return made[bits, change]

    return build


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
        """Those of fused.linear_packed."""
        packed, sums = fused.pack_weight(self.weight, self.bits), self.weight.sum(-1, dtype=torch.int32)
        return self.x, self.x_scale, self.zero_point, packed, sums, self.weight_scale, self.bias

    def run(self, library, **outputs):
        short = -self.x.shape[-1] % (16 if self.bits == 8 else 32)
        x, weight = pad(self.x, (0, short), value=5), pad(self.weight, (0, short))
        channels = x.shape[-1]
        if self.bits == 4:
            x, weight = reference.pack_int4(x), reference.pack_int4(weight)
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
        assert run(library, f"linear_s{self.bits}", problem)

    def y(self, library, dtype):
        y = guarded(poisoned(*self.shape, self.features, dtype=dtype), self.offset)
        self.run(library, y=y, y_type=kind(y))
        return y

    def codes(self, library, inv_scale, zero_point, inv_smooth, bits, packed=False, extra=0):
        """Rows of bytes, `extra` of them behind the codes."""
        row = extra + ((self.features + 1) // 2 if packed else self.features)
        codes = guarded(poisoned(*self.shape, row, dtype=torch.int8).view(torch.uint8), self.offset)
        smooth = None if inv_smooth is None else guarded(inv_smooth, self.offset)
        qparams = qparams_struct(inv_scale, zero_point, smooth, bits)
        self.run(library, codes=codes, nibbles=packed, codes_row=row, qparams=qparams)
        return codes


def is_right(linear, library, dtype):
    return torch.equal(linear.y(library, dtype), fused.linear_packed(*linear.arguments(), dtype))


@BITS
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
def test_results_are_the_references(linears, bits, drawn):
    *of, dtype = drawn
    assert is_right(Linear(bits, *of), linears(bits), dtype)


def test_sums_as_large_as_they_get_are_exact(linears):
    """|acc| is beyond what float32 holds exactly, and close to int32's end after the correction."""
    linear = Linear(8, 1, 3, 4096, 8, "token", 0)
    linear.x.fill_(-128), linear.weight.fill_(127), linear.zero_point.fill_(127)
    linear.x_scale.fill_(2.0**-10), linear.weight_scale.fill_(2.0**-10)
    assert is_right(linear, linears(8), torch.float32)


def gelu_qparams(linear, bits, smooth):
    linear.x_scale, linear.weight_scale = linear.x_scale / 64, linear.weight_scale / max(1, linear.x.shape[-1])
    scale, zero_point = linear.qparams(bits)
    return 1 / scale, zero_point, linear.scales(linear.features) if smooth else None, bits


@BITS
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
def test_codes_of_the_gelu_are_the_references(linears, bits, drawn):
    *of, smooth, new_bits, extra = drawn
    linear = Linear(bits, *of)
    new = gelu_qparams(linear, new_bits, smooth)
    wanted = fused.linear_gelu_quantize(*linear.arguments(), False, *new)
    whole = linear.codes(linears(bits), *new, extra=extra)
    codes, behind = whole.split([linear.features, extra], -1)
    apart = (codes.view(torch.int8).int() - wanted.int()).abs()
    assert (apart <= 1).all() and apart.sum() <= apart.numel() / 1000 and torch.equal(behind, untouched(behind))
    if new_bits <= 4:
        packed = linear.codes(linears(bits), *new, packed=True, extra=extra)
        pairs, behind = packed.split([packed.shape[-1] - extra, extra], -1)
        assert torch.equal(pairs, reference.pack_int4(codes.view(torch.int8))) and torch.equal(
            behind, untouched(behind)
        )


def untouched(bytes_: Tensor) -> Tensor:
    return poisoned(*bytes_.shape, dtype=torch.int8).view(torch.uint8)


def test_what_does_not_fit_one_launch_is_refused(linears):
    empty = torch.empty(1, dtype=torch.uint8)
    for sizes in ({"rows": 2**31}, {"features": 2**31}, {"directions": 65536}, {"codes": empty, "directions": 2}):
        problem = LinearProblem(**{"rows": 1, "features": 1, "channels": 16, "directions": 1, "scales": 1, **sizes})
        assert not run(linears(8), "linear_s8", problem)


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


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, *MISTAKES])
def test_mistakes_are_seen(linears, change):
    library = linears(4, change)

    def check():
        for features in (8, 44, 65):
            assert is_right(Linear(4, 2, 50, 96, features, "token", 1, 2), library, torch.float32)
            linear = Linear(4, 2, 50, 96, features + features % 8 // 5, "token", 1)
            new = gelu_qparams(linear, 4, True)
            wanted = fused.linear_gelu_quantize(*linear.arguments(), False, *new)
            for packed in (False, True):
                codes = linear.codes(library, *new, packed=packed, extra=2)[..., :-2]
                assert torch.equal(codes, reference.pack_int4(wanted) if packed else wanted.view(torch.uint8))
        assert is_right(Linear(4, 1, 5, 0, 8, "token", 1), library, torch.float32)

    assert is_caught(check) == (change is not None)
