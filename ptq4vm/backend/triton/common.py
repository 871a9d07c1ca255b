"""Shared by the kernels: the rounding of codes, and the launch.

Shapes as in `ops`, which has checked all arguments. Offsets have 64 bits; a row's number has as many as the number
of rows needs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDING = {"enable_fp_fusion": False}
"""Every product and every sum is rounded on its own, as in the reference."""


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 3, **constants: Any) -> None:
    if programs:
        kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages, **ROUNDING)


def tile(channels: int, numbers: int) -> tuple[int, int]:
    """Rows and channels (powers of two) of a part of a matrix with about so many numbers."""
    width = min(triton.next_power_of_2(max(16, channels)), 256)
    return max(1, numbers // width), width


@triton.jit
def own_rows(at, rows, ROWS: tl.constexpr):
    """Returns the rows of the tile number `at`; `rows` is an argument that is not specialized, and so has a type."""
    return at.to(rows.dtype) * ROWS + tl.arange(0, ROWS)


@triton.jit
def code(value, inv_scale, zero_point, BITS: tl.constexpr):
    """`quantize` of smoothed values, as int8. NaN has the code 0, as in torch."""
    zero = zero_point.to(tl.float32)
    scaled = value * inv_scale
    bounded = tl.maximum(scaled, -(2.0 ** (BITS - 1)) - zero)
    bounded = tl.minimum(bounded, 2.0 ** (BITS - 1) - 1 - zero)
    rounded = (bounded + 12582912.0) - 12582912.0  # 1.5 · 2^23: what is added to it is rounded half to even
    return tl.where(scaled == scaled, rounded + zero, 0.0).to(tl.int8)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


def float32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def optional_float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else float32(x)


def read_qparams(scale: Tensor, zero_point: Tensor, stacked: bool = False) -> tuple[Tensor, Tensor, int]:
    """Returns scales, zero points, and how many there are, of each direction if stacked: one, one a token or a row."""
    return float32(scale), zero_point.to(torch.int32).contiguous(), max(1, scale.shape[stacked:].numel())
