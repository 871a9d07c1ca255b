"""The integer linears on int8 tensor cores, with the reference's accumulators and its floats to the last bit.

Weights are read in every layout that they have: rows of int8, rows of two 4-bit codes a byte, and the tiles of
`layouts.pack_weight`. Those are 16 output by 64 input channels, where 64 bytes hold four input channels of each output
channel; or 32 bytes, whose low and high nibbles are the two halves of them.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ptq4vm.backend.triton.common import code, float32, gelu, launch, optional_float32, own_rows, read_qparams
from ptq4vm.ops import layouts, rotation
from ptq4vm.ops.linears import Packed
from ptq4vm.ops.quantization import QParams

ALIGNMENT = 16
"""Bytes of an access to rows of codes, which are padded to a multiple of them."""


@triton.jit
def low_nibbles(values):
    return (values << 4).to(tl.int8, bitcast=True) >> 4


@triton.jit
def high_nibbles(values):
    return values.to(tl.int8, bitcast=True) >> 4


@triton.jit
def weights_in_rows(
    weight, n, d, features, columns, NIBBLES: tl.constexpr, FEATURES: tl.constexpr, CHANNELS: tl.constexpr
):
    """int8 (CHANNELS, FEATURES) from output channel n and input channel d on; `columns` are the bytes of a row."""
    CODES: tl.constexpr = 2 if NIBBLES else 1  # in a byte
    f, byte = n + tl.arange(0, FEATURES), d // CODES + tl.arange(0, CHANNELS // CODES)
    real = (f < features)[:, None] & (byte < columns)[None, :]
    values = tl.load(weight + f.to(tl.int64)[:, None] * columns + byte[None, :], mask=real, other=0)
    if NIBBLES:
        values = tl.reshape(tl.join(low_nibbles(values), high_nibbles(values)), (FEATURES, CHANNELS))
    return tl.trans(values)


@triton.jit
def weights_in_tiles(
    weight, n, d, features, channels, NIBBLES: tl.constexpr, FEATURES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Loads a packed weight in whole tiles: beyond its sizes these hold zeros."""
    BYTES: tl.constexpr = 512 if NIBBLES else 1024
    GROUPS: tl.constexpr = FEATURES // 16
    STEPS: tl.constexpr = CHANNELS // 64
    group, step = n // 16 + tl.arange(0, GROUPS), d // 64 + tl.arange(0, STEPS)
    groups, steps = tl.cdiv(features, 16), tl.cdiv(channels, 64)
    tiles = group.to(tl.int64)[:, None] * steps + step[None, :]
    at = tiles[:, :, None] * BYTES + tl.arange(0, BYTES)[None, None, :]
    values = tl.load(weight + at, mask=(group < groups)[:, None, None] & (step < steps)[None, :, None], other=0)
    if NIBBLES:
        pairs = tl.reshape(tl.join(low_nibbles(values), high_nibbles(values)), (GROUPS, STEPS, 16, 32, 2))
        values = tl.permute(pairs, (0, 1, 2, 4, 3))
    values = tl.reshape(values, (GROUPS, STEPS, 16, 16, 4))  # the last three: fours of input channels, output, input
    return tl.reshape(tl.permute(values, (1, 2, 4, 0, 3)), (CHANNELS, FEATURES))


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,
    x_scale,
    x_zero_point,
    scales,
    weight,
    weight_sum,
    weight_scale,
    bias,
    inv_scale,
    zero_point,
    code_scales,
    inv_smooth,
    y,
    rows,
    channels,
    features,
    columns,
    weight_bytes,
    TILED: tl.constexpr,
    NIBBLES: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BAND: tl.constexpr,
):
    """With BITS 0 this writes y, else the codes of its GELU. Programs of a band of rows run together and share x."""
    panels, tiles = tl.cdiv(features, FEATURES), tl.cdiv(rows, ROWS)
    direction = (tl.program_id(0) // (panels * tiles)).to(tl.int64)
    at = tl.program_id(0) % (panels * tiles)
    band = at // (panels * BAND) * BAND
    height = min(tiles - band, BAND)
    at_in_band = at % (panels * BAND)
    row = own_rows(band + at_in_band % height, rows, ROWS)
    n = at_in_band // height * FEATURES
    real_row = row < rows

    x += direction * rows * channels
    weight += direction * weight_bytes
    x_rows = x + row.to(tl.int64)[:, None] * channels
    sums = tl.zeros((ROWS, FEATURES), tl.int32)
    for d in range(0, channels, CHANNELS):
        e = d + tl.arange(0, CHANNELS)
        values = tl.load(x_rows + e[None, :], mask=real_row[:, None] & (e < channels)[None, :], other=0)
        if TILED:
            factors = weights_in_tiles(weight, n, d, features, channels, NIBBLES, FEATURES, CHANNELS)
        else:
            factors = weights_in_rows(weight, n, d, features, columns, NIBBLES, FEATURES, CHANNELS)
        sums = tl.dot(values, factors, sums, out_dtype=tl.int32)

    f = n + tl.arange(0, FEATURES)
    feature = f < features
    own_row = direction * scales + row % scales
    own = direction * features + f
    zero = tl.load(x_zero_point + own_row)[:, None]
    sums -= zero * tl.load(weight_sum + own, mask=feature, other=0)[None, :]
    value = sums.to(tl.float32) * tl.load(x_scale + own_row)[:, None]
    value *= tl.load(weight_scale + own, mask=feature, other=0.0)[None, :]
    if bias is not None:
        value += tl.load(bias + own, mask=feature, other=0.0)[None, :]
    real = real_row[:, None] & feature[None, :]
    place = y + (direction * rows + row)[:, None] * features + f[None, :]
    if BITS:
        value = gelu(value)
        if inv_smooth is not None:
            value *= tl.load(inv_smooth + f, mask=feature, other=0.0)[None, :]
        code_row = row % code_scales
        scale, code_zero = tl.load(inv_scale + code_row)[:, None], tl.load(zero_point + code_row)[:, None]
        tl.store(place, code(value, scale, code_zero, BITS), mask=real)
    else:
        tl.store(place, value.to(y.dtype.element_ty), mask=real)


def tile_of(rows: int, features: int) -> dict[str, int]:
    """Returns the tile and its warps: eight for 128 by 128, as four would spill registers on compute capability 8.x."""
    if rows <= 32:
        return {"ROWS": 32, "FEATURES": 64, "warps": 4}
    if features <= 32:
        return {"ROWS": 128, "FEATURES": 32, "warps": 4}
    if features <= 64 or rows <= 1024:
        return {"ROWS": 64, "FEATURES": 64, "warps": 4}
    return {"ROWS": 128, "FEATURES": 128, "warps": 8}


def linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    codes = layouts.unpack_int4(weight, x.shape[-1]) if weight.dtype == torch.uint8 else weight
    weight_sum = codes.sum(-1, dtype=torch.int32)
    return linear_packed(x, x_scale, x_zero_point, codes, weight_sum, weight_scale, bias, dtype)


def linear_gelu_quantize(*inputs: *tuple[*Packed, bool, *QParams]) -> Tensor:
    if inputs[7]:
        return rotation.rotate_quantize(linear_packed(*inputs[:7], torch.float32), True, *inputs[8:])
    inv_scale, zero_point, inv_smooth, bits = inputs[8:]
    qparams = (*read_qparams(inv_scale, zero_point), optional_float32(inv_smooth), bits)
    return linear_packed(*inputs[:7], torch.int8, qparams)


def _aligned(codes: Tensor) -> Tensor:
    spare = -codes.shape[-1] % ALIGNMENT
    return F.pad(codes, (0, spare)) if spare else codes.contiguous()


def linear_packed(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    qparams: tuple[Tensor | None, Tensor | None, int, Tensor | None, int] = (None, None, 1, None, 0),
) -> Tensor:
    """y; with `qparams` (inverse scales, zero points, their number, inverse smoothing, bits) the codes of its GELU."""
    *lead, features = weight_scale.shape
    directions, stacked, tiled = math.prod(lead), bool(lead), weight.dim() > weight_scale.dim() + 1
    y = torch.empty((*x.shape[:-1], features), dtype=dtype, device=x.device)
    rows = x.shape[len(lead) : -1].numel()
    x, weight = _aligned(x), _aligned(weight)
    *code_qparams, bits = qparams
    sizes = tile_of(rows, features)
    launch(
        linear_kernel,
        directions * triton.cdiv(rows, sizes["ROWS"]) * triton.cdiv(features, sizes["FEATURES"]),
        x,
        *read_qparams(x_scale, x_zero_point, stacked),
        weight,
        weight_sum.to(torch.int32).contiguous(),
        float32(weight_scale),
        optional_float32(bias),
        *code_qparams,
        y,
        rows,
        x.shape[-1],
        features,
        weight.shape[-1],
        weight.numel() // max(1, directions),
        TILED=tiled,
        NIBBLES=weight.dtype == torch.uint8,
        BITS=bits,
        CHANNELS=layouts.K_TILE,
        BAND=8,
        **sizes,
    )
    return y
