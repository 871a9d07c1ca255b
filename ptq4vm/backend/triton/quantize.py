"""Quantizes as the reference does, bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq4vm.backend.triton.common import code, launch, optional_float32, own_rows, read_qparams, tile


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x,
    inv_scale,
    zero_point,
    scales,
    inv_smooth,
    codes,
    rows,
    channels,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    panels = tl.cdiv(channels, CHANNELS)
    row = own_rows(tl.program_id(0) // panels, rows, ROWS)
    d = tl.program_id(0) % panels * CHANNELS + tl.arange(0, CHANNELS)
    real = (row < rows)[:, None] & (d < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + d[None, :]
    value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if inv_smooth is not None:
        value *= tl.load(inv_smooth + d, mask=d < channels, other=0.0)[None, :]
    own = row % scales
    scale = tl.load(inv_scale + own)[:, None]
    tl.store(codes + at, code(value, scale, tl.load(zero_point + own)[:, None], BITS), mask=real)


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int) -> Tensor:
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.int8)
    rows, channels = x.shape[:-1].numel(), x.shape[-1]
    height, width = tile(channels, 4096)
    launch(
        quantize_kernel,
        triton.cdiv(rows, height) * triton.cdiv(channels, width),
        x,
        *read_qparams(inv_scale, zero_point),
        optional_float32(inv_smooth),
        codes,
        rows,
        channels,
        BITS=bits,
        ROWS=height,
        CHANNELS=width,
    )
    return codes
