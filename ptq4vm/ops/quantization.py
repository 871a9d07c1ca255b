"""Quantization of activations and weights to integer codes, and the choice of scales and zero points.

Shapes: B images, L tokens, D channels in, N channels out. An activation x is (B, L, D). Its qparams are one per token
(L,), one per tensor (1,), or one per image and token (B, L): they broadcast against x without its last axis. Weights
are (N, D) with one scale per output channel (N,). Codes are signed: [-2^(b-1), 2^(b-1) - 1] for activations,
[1 - 2^(b-1), 2^(b-1) - 1] for weights.
"""

from typing import Any

import torch
from torch import Tensor

from ptq4vm.ops._arguments import Values, check_scales
from ptq4vm.ops._define import define
from ptq4vm.quantization_specs import IntegerRange

EPSILON = torch.finfo(torch.float32).tiny
"""The smallest scale whose reciprocal is finite: a tensor of zeros still has one."""

QParams = tuple[Tensor, Tensor, Tensor | None, int]
"""The last arguments of an operator that returns codes: inv_scale, zero_point, inv_smooth and bits."""

QPARAMS = "Tensor inv_scale, Tensor zero_point, Tensor? inv_smooth, int bits"
QPARAMS_SHAPES = "inv_scale float tokens; zero_point zeros =inv_scale; inv_smooth float D; bits bits"


def code_range(bits: int, symmetric: bool = False) -> tuple[int, int]:
    """Returns the first and the last code of activations, or of weights, which are symmetric."""
    return IntegerRange(bits=bits, narrow_range=symmetric).bounds


def along_channels(qparams: Tensor, x: Tensor) -> Tensor:
    """Returns qparams that broadcast against x; an x (D,) without tokens has (1,)."""
    return qparams if qparams.dim() >= x.dim() else qparams.unsqueeze(-1)


def _quantize_fake(x: Tensor, inv_scale: Tensor, *rest: Any) -> Tensor:
    check_scales(x, inv_scale)
    return x.new_empty(x.shape, dtype=torch.int8)


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int) -> Tensor:
    """Smooths, multiplies by the reciprocal, rounds half to even, shifts, clamps; int8 codes in x's shape."""
    codes = unclamped_codes(x, inv_scale, zero_point, inv_smooth)
    return codes.clamp(*code_range(bits)).to(torch.int8).contiguous()


def unclamped_codes(x: Tensor, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None) -> Tensor:
    """Returns the codes of `quantize` before they are clamped, float32."""
    return torch.round(_smoothed(x, inv_smooth) * along_channels(inv_scale.float(), x)) + along_channels(zero_point, x)


def _smoothed(x: Tensor, inv_smooth: Tensor | None) -> Tensor:
    return x.float() if inv_smooth is None else x.float() * inv_smooth.float()


def dequantize(x_q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns (q - z) · scale in float32."""
    return ((x_q.float() - along_channels(zero_point, x_q)) * along_channels(scale.float(), x_q)).contiguous()


def quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns symmetric int8 codes (N, D) of an already smoothed weight (N, D), one scale per output channel (N,)."""
    codes = torch.round(weight.float() / scale.unsqueeze(-1))
    return codes.clamp(*code_range(bits, symmetric=True)).to(torch.int8)


def affine_qparams(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns scale (float32) and zero point (int32) of the range [min(low, 0), max(high, 0)], elementwise.

    The zero point of a range that is not finite is 0, so that its codes stand for NaN.
    """
    first, last = code_range(bits)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = ((high - low) / (last - first)).clamp(min=EPSILON)
    zero_point = (first - torch.round(low / scale)).clamp(first, last)
    return scale, zero_point.nan_to_num(0.0).to(torch.int32)


def _check_channels(values: Values) -> None:
    if not values["x"].shape[-1]:
        raise ValueError("x needs channels: no token has a range without them")


def choose_qparams(x: Tensor, inv_smooth: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point (B, L) of every token of x (B, L, D), from its own minimum and maximum."""
    v = _smoothed(x, inv_smooth)
    return affine_qparams(v.amin(-1), v.amax(-1), bits)


define(f"quantize(Tensor x, {QPARAMS}) -> Tensor", quantize, f"x float ... D; {QPARAMS_SHAPES}", _quantize_fake)
define(
    "dequantize(Tensor x_q, Tensor scale, Tensor zero_point) -> Tensor",
    dequantize,
    "x_q codes ... D; scale float tokens; zero_point zeros =scale",
    lambda x_q, *rest: x_q.new_empty(x_q.shape, dtype=torch.float32),
)
define(
    "choose_qparams(Tensor x, Tensor? inv_smooth, int bits) -> (Tensor scale, Tensor zero_point)",
    choose_qparams,
    "x float ... D; inv_smooth float D; bits bits",
    lambda x, *rest: tuple(x.new_empty(x.shape[:-1], dtype=dtype) for dtype in (torch.float32, torch.int32)),
    checks=(_check_channels,),
)
