"""norms.norm_quantize: the sum with the residual, its norm and the codes in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq4vm.backend.triton.common import code, launch, optional_float32, own_rows, read_qparams
from ptq4vm.ops import norms
from ptq4vm.ops.quantization import QParams

LONGEST = 8192
"""Channels of a row that stays in registers."""


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    inv_scale,
    zero_point,
    scales,
    inv_smooth,
    codes,
    rows,
    channels,
    eps,
    RMS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = own_rows(tl.program_id(0), rows, ROWS)
    d = tl.arange(0, CHANNELS)
    channel = d < channels
    real = (row < rows)[:, None] & channel[None, :]
    at = row.to(tl.int64)[:, None] * channels + d[None, :]
    value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at, mask=real, other=0.0)
        tl.store(total + at, value, mask=real)
    if not RMS:
        value = tl.where(real, value - (tl.sum(value, 1) / channels)[:, None], 0.0)
    variance = tl.sum(value * value, 1) / channels
    value *= tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
    if weight is not None:
        value *= tl.load(weight + d, mask=channel, other=0.0)[None, :]
    if bias is not None:
        value += tl.load(bias + d, mask=channel, other=0.0)[None, :]
    if inv_smooth is not None:
        value *= tl.load(inv_smooth + d, mask=channel, other=0.0)[None, :]
    own = row % scales
    scale = tl.load(inv_scale + own)[:, None]
    tl.store(codes + at, code(value, scale, tl.load(zero_point + own)[:, None], BITS), mask=real)


def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    rotated: bool,
    *qparams: *QParams,
) -> tuple[Tensor, Tensor]:
    """Rotated norms and very long rows take the reference."""
    channels = x.shape[-1]
    if rotated or channels > LONGEST:
        total, codes = norms.norm_quantize(x, residual, weight, bias, eps, rms, rotated, *qparams)
        return total.contiguous(), codes.contiguous()
    inv_scale, zero_point, inv_smooth, bits = qparams
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.int8)
    total = x.new_empty(0 if residual is None else x.shape, dtype=torch.float32)
    rows = x.shape[:-1].numel()
    width = triton.next_power_of_2(max(16, channels))
    height = max(1, 2048 // width)
    launch(
        norm_kernel,
        triton.cdiv(rows, height) if channels else 0,
        x,
        optional_float32(residual),
        optional_float32(weight),
        optional_float32(bias),
        total,
        *read_qparams(inv_scale, zero_point),
        optional_float32(inv_smooth),
        codes,
        rows,
        channels,
        eps,
        RMS=rms,
        BITS=bits,
        ROWS=height,
        CHANNELS=width,
        warps=4 if width <= 2048 else 8,
    )
    return total, codes
