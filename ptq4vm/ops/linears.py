"""Integer linears: products of int8 codes summed exactly, then rescaled, alone or with what follows them.

The exact half and the rounded half are two functions, because kernels are compared with them differently.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.backend import native
from ptq4vm.ops._arguments import FLOATS, Values, check_scales
from ptq4vm.ops._define import define
from ptq4vm.ops.layouts import tiles_shape, unpack_int4, weight_codes
from ptq4vm.ops.quantization import QPARAMS, QParams, along_channels
from ptq4vm.ops.rotation import quantize_output

EXACT_CHANNELS = 1024
"""So many products of two int8 codes sum exactly in float32: 1024 · 128 · 128 = 2^24."""

MAX_CHANNELS = 2**16 - 1
"""So many products of int8 codes have an int32 sum."""


def accumulate(x_q: Tensor, x_zero_point: Tensor, w_q: Tensor) -> Tensor:
    """Returns Σ q · w - z · Σ w as int32 (…, N) from int8 codes. A kernel that differs here by one is wrong.

    The products run through a float32 matmul in pieces of `EXACT_CHANNELS`, which is exact in any order of
    summation, and fast everywhere; int32 matmul has no kernel on CPUs.
    """
    acc = torch.zeros(*x_q.shape[:-1], w_q.shape[0], dtype=torch.int32, device=x_q.device)
    for x, w in zip(x_q.split(EXACT_CHANNELS, -1), w_q.split(EXACT_CHANNELS, -1), strict=True):
        acc += F.linear(x.float(), w.float()).to(torch.int32)
    return acc - along_channels(x_zero_point.to(torch.int32), x_q) * w_q.sum(-1, dtype=torch.int32)


def rescale(acc: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns (float32(acc) · scale_x[t]) · scale_w[n] + bias[n], then one cast."""
    y = (acc.float() * along_channels(x_scale.float(), acc)) * w_scale.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def _check_out_dtype(values: Values) -> None:
    if values["out_dtype"] not in FLOATS:
        raise ValueError(f"out_dtype must be float32, bfloat16, float16 or float64, it is {values['out_dtype']}")


def _check_max_channels(values: Values) -> None:
    if (channels := values["x"].shape[-1]) > MAX_CHANNELS:
        raise ValueError(f"sums of {channels} products of int8 codes may not fit int32")


def _check_columns(x: Tensor, weight: Tensor) -> None:
    packed = weight.dtype == torch.uint8
    wanted = (x.shape[-1] + 1) // 2 if packed else x.shape[-1]
    if weight.shape[-1] != wanted:
        kind = "packed 4-bit" if packed else "int8"
        raise ValueError(
            f"a {kind} weight for {x.shape[-1]} channels has {wanted} columns, this one {weight.shape[-1]}"
        )


def _linear_fake(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    check_scales(x, x_scale)
    _check_columns(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[-1])


def linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiplies int8 codes x (…, D) by a weight: int8 (N, D), or packed 4-bit uint8 (N, ceil(D / 2))."""
    if native.unavailable_reason() and x.device.type == "cpu":
        native.warn()
    w_q = unpack_int4(weight, x.shape[-1]) if weight.dtype == torch.uint8 else weight
    return rescale(accumulate(x, x_zero_point, w_q), x_scale, weight_scale, bias, out_dtype).contiguous()


Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""The arguments of a packed linear, before the type of its result."""
_PACKED = (
    "Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_sum, Tensor weight_scale, Tensor? bias"
)
_SHAPES = (
    "x codes ... D; x_scale float tokens; x_zero_point zeros =x_scale; weight weight *; weight_scale float N; "
    "weight_sum sums N; bias float N"
)
_STACKED_SHAPES = (
    "x codes K ... D; x_scale float K tokens; x_zero_point zeros =x_scale; weight weight *; weight_scale float K N; "
    "weight_sum sums K N; bias float K N"
)


def _check_packed_weight(values: Values) -> None:
    _check_max_channels(values)
    weight, channels, stack = values["weight"], values["x"].shape[-1], tuple(values["weight_scale"].shape[:-1])
    features, packed = values["weight_scale"].shape[-1], weight.dtype == torch.uint8
    rows = (*stack, features, math.ceil(channels / (32 if packed else 16)) * 16)
    tiles = (*stack, *tiles_shape(features, channels, packed))
    if tuple(weight.shape) not in (rows, tiles):
        raise ValueError(
            f"a weight of {features} × {channels} channels is packed into {tiles[len(stack) :]} {weight.dtype}, this "
            f"one is {tuple(weight.shape)}; pack it with ptq4vm.ops.layouts.pack_weight"
        )
    check_sums("weight_sum", values["weight_sum"], channels)


def check_sums(name: str, sums: Tensor, channels: int) -> None:
    """Raises ValueError for a sum that so many int8 codes cannot have."""
    if sums.device.type != "cpu":
        return
    sums = sums.long()
    wrong = sums[(sums < -128 * channels) | (sums > 128 * channels)]
    if len(wrong):
        raise ValueError(
            f"{name} has the value {int(wrong[0])}, but the sum of {channels} codes is between {-128 * channels} and "
            f"{128 * channels}"
        )


def linear_packed(*inputs: *tuple[*Packed, torch.dtype]) -> Tensor:
    """Computes `linear` with a weight of `pack_weight` or `pad_weight`, and the int32 sums of its rows' codes.

    Sums are shaped as weight_scale. weight_scale (N,) is one linear of x (…, D). weight_scale (K, N) is K of them, with
    x (K, …, D), x_scale and x_zero_point (K, L) or (K, 1), and bias (K, N).
    """
    x, x_scale, x_zero_point, weight, _, weight_scale, bias, out_dtype = inputs
    w_q = weight_codes(weight, weight_scale, x.shape[-1])
    if weight_scale.dim() == 1:
        return rescale(accumulate(x, x_zero_point, w_q), x_scale, weight_scale, bias, out_dtype)
    sums = [accumulate(x[k], x_zero_point[k], w_q[k]) for k in range(len(x))]
    biases = [None] * len(x) if bias is None else bias.unbind(0)
    return torch.stack([rescale(sums[k], x_scale[k], weight_scale[k], biases[k], out_dtype) for k in range(len(x))])


def _gelu_shapes(values: Values) -> str:
    if values["weight_scale"].dim() == 2:
        raise ValueError(f"a GELU follows one linear, not {len(values['weight_scale'])} stacked ones")
    return f"{_SHAPES}; inv_scale float tokens; zero_point zeros =inv_scale; inv_smooth float N; bits bits"


def linear_gelu_quantize(*inputs: *tuple[*Packed, bool, *QParams]) -> Tensor:
    """Returns the codes of one linear's GELU (the exact one, with erf), or of its rotation: an MLP's second input."""
    return quantize_output(F.gelu(linear_packed(*inputs[:7], torch.float32)), *inputs[7:])


define(
    "linear(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    linear,
    "x codes ... D; x_scale float tokens; x_zero_point zeros =x_scale; weight weight N *; weight_scale float N; "
    "bias float N",
    _linear_fake,
    checks=(_check_out_dtype, _check_max_channels, lambda values: _check_columns(values["x"], values["weight"])),
)
define(
    f"linear_packed({_PACKED}, ScalarType out_dtype) -> Tensor",
    linear_packed,
    lambda values: _STACKED_SHAPES if values["weight_scale"].dim() == 2 else _SHAPES,
    lambda x, *rest: x.new_empty((*x.shape[:-1], rest[4].shape[-1]), dtype=rest[-1]),
    checks=(_check_out_dtype, _check_packed_weight),
)
define(
    f"linear_gelu_quantize({_PACKED}, bool rotated, {QPARAMS}) -> Tensor",
    linear_gelu_quantize,
    _gelu_shapes,
    lambda x, *rest: x.new_empty((*x.shape[:-1], rest[4].shape[-1]), dtype=torch.int8),
    checks=(_check_packed_weight,),
)
