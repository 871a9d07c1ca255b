"""causal_conv1d, conv1d_quantize and conv2d_quantize: convolution, SiLU and codes in one pass.

Computed in float32. Rows of x may lie anywhere, as long as their channels are neighbours.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq4vm.backend.triton.common import code, float32, launch, optional_float32, read_qparams, silu, tile
from ptq4vm.ops import convolution_1d
from ptq4vm.ops.quantization import QParams

NUMBERS = 1024
"""Results of a program."""


@triton.jit
def conv1d_kernel(
    x,
    x_image,
    x_row,
    weight,
    bias,
    order,
    y,
    inv_scale,
    zero_point,
    scales,
    inv_smooth,
    codes,
    batch,
    tokens,
    channels,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    panels, chunks = tl.cdiv(channels, CHANNELS), tl.cdiv(tokens, STEPS)
    e = tl.program_id(0) % panels * CHANNELS + tl.arange(0, CHANNELS)
    step = tl.program_id(0) // panels % chunks * STEPS + tl.arange(0, STEPS)
    item = (tl.program_id(0) // panels // chunks).to(tl.int64)
    direction, image = item // batch, item % batch
    channel = e < channels
    own = direction * channels + e  # of weights and the like
    sums = tl.zeros((STEPS, CHANNELS), tl.float32)
    token = step
    for tap in tl.static_range(TAPS):
        at = step + (tap - TAPS + 1)
        inside = (at >= 0) & (at < tokens)
        token = at
        if order is not None:
            token = tl.load(order + direction * tokens + at, mask=inside, other=0)
        place = image * x_image + token.to(tl.int64)[:, None] * x_row + e[None, :]
        value = tl.load(x + place, mask=inside[:, None] & channel[None, :], other=0.0)
        sums += value.to(tl.float32) * tl.load(weight + own * TAPS + tap, mask=channel, other=0.0)[None, :]
    # `token` is now the one of this step
    if bias is not None:
        sums += tl.load(bias + own, mask=channel, other=0.0)[None, :]
    if SILU:
        sums = silu(sums)
    real = (step < tokens)[:, None] & channel[None, :]
    place = (item * tokens + token)[:, None] * channels + e[None, :]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=real)
    if codes is not None:
        if inv_smooth is not None:
            sums *= tl.load(inv_smooth + own, mask=channel, other=0.0)[None, :]
        own_token = direction * scales + token % scales
        scale, zero = tl.load(inv_scale + own_token)[:, None], tl.load(zero_point + own_token)[:, None]
        tl.store(codes + place, code(sums, scale, zero, BITS), mask=real)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """float64 takes the reference, for the sake of gradient checks."""
    if x.dtype == torch.float64:
        return convolution_1d.causal_conv1d(x, weight, bias, silu)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_conv1d(x, weight, bias, None, y, (None, None, 1), None, None, SILU=silu, BITS=8)
    return y


def conv1d_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, *qparams: *QParams
) -> tuple[Tensor, Tensor]:
    inv_scale, zero_point, inv_smooth, bits = qparams
    y = torch.empty((len(weight), *x.shape), dtype=x.dtype, device=x.device)
    codes = torch.empty_like(y, dtype=torch.int8)
    scales, order = read_qparams(inv_scale, zero_point, stacked=True), order.to(torch.int32).contiguous()
    _launch_conv1d(x, weight, bias, order, y, scales, inv_smooth, codes, SILU=True, BITS=bits)
    return y, codes


def _launch_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    y: Tensor,
    qparams: tuple[Tensor | None, Tensor | None, int],
    inv_smooth: Tensor | None,
    codes: Tensor | None,
    **constants: Any,
) -> None:
    x = _with_rows(x)
    *items, tokens, channels = y.shape
    steps, width = tile(channels, NUMBERS)
    launch(
        conv1d_kernel,
        math.prod(items) * triton.cdiv(tokens, steps) * triton.cdiv(channels, width),
        x,
        x.stride(0),
        x.stride(1),
        float32(weight),
        optional_float32(bias),
        order,
        y,
        *qparams,
        optional_float32(inv_smooth),
        codes,
        *x.shape,
        TAPS=weight.shape[-1],
        STEPS=steps,
        CHANNELS=width,
        **constants,
    )


@triton.jit
def conv2d_kernel(
    x,
    x_image,
    x_row,
    weight,
    bias,
    y,
    inv_scale,
    zero_point,
    scales,
    inv_smooth,
    codes,
    directions,
    batch,
    height,
    width,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tokens = height * width
    panels, chunks = tl.cdiv(channels, CHANNELS), tl.cdiv(tokens, STEPS)
    e = tl.program_id(0) % panels * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(0) // panels % chunks * STEPS + tl.arange(0, STEPS)
    image = (tl.program_id(0) // panels // chunks).to(tl.int64)
    channel = e < channels
    sums = tl.zeros((STEPS, CHANNELS), tl.float32)
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            h, w = token // width + (i - ROWS // 2), token % width + (j - COLUMNS // 2)
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            place = image * x_image + (h * width + w).to(tl.int64)[:, None] * x_row + e[None, :]
            value = tl.load(x + place, mask=inside[:, None] & channel[None, :], other=0.0)
            factor = tl.load(weight + (e * ROWS + i) * COLUMNS + j, mask=channel, other=0.0)
            sums += value.to(tl.float32) * factor[None, :]
    if bias is not None:
        sums += tl.load(bias + e, mask=channel, other=0.0)[None, :]
    sums = silu(sums)
    real = (token < tokens)[:, None] & channel[None, :]
    place = (image * tokens + token)[:, None] * channels + e[None, :]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=real)
    for direction in range(directions):
        place = ((direction * batch + image) * tokens + token)[:, None] * channels + e[None, :]
        smoothed = sums
        if inv_smooth is not None:
            smoothed *= tl.load(inv_smooth + direction * channels + e, mask=channel, other=0.0)[None, :]
        own = direction * scales + token % scales
        scale, zero = tl.load(inv_scale + own)[:, None], tl.load(zero_point + own)[:, None]
        tl.store(codes + place, code(smoothed, scale, zero, BITS), mask=real)


def conv2d_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, *qparams: *QParams
) -> tuple[Tensor, Tensor]:
    inv_scale, zero_point, inv_smooth, bits = qparams
    batch, tokens, channels = x.shape
    directions, rows, columns = len(inv_scale), *weight.shape[1:]
    x = _with_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes = torch.empty((directions, *x.shape), dtype=torch.int8, device=x.device)
    steps, panel = tile(channels, NUMBERS)
    launch(
        conv2d_kernel,
        batch * triton.cdiv(tokens, steps) * triton.cdiv(channels, panel),
        x,
        x.stride(0),
        x.stride(1),
        float32(weight),
        optional_float32(bias),
        y,
        *read_qparams(inv_scale, zero_point, stacked=True),
        optional_float32(inv_smooth),
        codes,
        directions,
        batch,
        height,
        width,
        channels,
        ROWS=rows,
        COLUMNS=columns,
        BITS=bits,
        STEPS=steps,
        CHANNELS=panel,
    )
    return y, codes


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
