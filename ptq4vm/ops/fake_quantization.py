"""Fake quantization in one operator: codes and what they stand for, in floating point, with gradients to learn by."""

from typing import Any

import torch
from torch import Tensor

from ptq4vm.ops._arguments import Values, check_scales
from ptq4vm.ops._define import define
from ptq4vm.ops.quantization import along_channels, code_range

_INPUTS = "Tensor x, Tensor scale, Tensor? zero_point, Tensor? smooth, int bits"
_NEEDS = "bool need_x, bool need_scale, bool need_zero_point, bool need_smooth"
_SHAPES = "x float ... D; scale float tokens; zero_point number =scale; smooth float D; bits bits"


def _fake(x: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    check_scales(x, scale)
    return x.new_empty(x.shape)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:4]
    grads = torch.ops.ptq4vm.fake_quantize_backward(grad.contiguous(), *ctx.saved_tensors, ctx.option, *needs)
    return *(value if need else None for value, need in zip(grads, needs, strict=True)), None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, smooth: Tensor | None, bits: int) -> Tensor:
    """Returns x · smooth after `quantize` and `dequantize`, or, without zero points, after `quantize_weight`."""
    _, _, clamped = _codes(x, scale, zero_point, smooth, bits)
    return (clamped * along_channels(scale.float(), x)).to(x.dtype).contiguous()


def _codes(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, smooth: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the value to round, its code less the zero point, and this code in range; all float32."""
    v, scale = x.float(), along_channels(scale.float(), x)
    if smooth is not None:
        v = v * smooth.float()
    if zero_point is None:
        v, zero = v / scale, torch.zeros_like(scale)
    else:
        v, zero = v * (1.0 / scale), along_channels(zero_point.float(), x)
    low, high = code_range(bits, symmetric=zero_point is None)
    codes = v.round()
    return v, codes, codes.clamp(low - zero, high - zero)


def _backward_fake(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, smooth: Tensor | None, bits: int, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_scale, need_zero_point, need_smooth = needs
    return (
        x.new_empty(x.shape if need_x else 0),
        scale.new_empty(scale.shape if need_scale else 0),
        scale.new_empty(scale.shape if need_zero_point else 0, dtype=torch.float32),
        (x if smooth is None else smooth).new_empty(x.shape[-1] if need_smooth else 0),
    )


def _check_needs(values: Values) -> None:
    for name, what in (("smooth", "smoothing"), ("zero_point", "zero point")):
        if values[name] is None and values[f"need_{name}"]:
            raise ValueError(f"there is no {what} whose gradient could be given")


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, smooth: Tensor | None, bits: int, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns straight-through gradients of x, scale, zero_point and smooth, empty where not needed.

    Rounding has the identity's gradient wherever the rounded code is in range, both ends included; not `clamp`'s,
    which is zero at the ends: the last codes would never learn. So the scale's is that of LSQ (Esser et al. 2020), and
    the zero point's that of LSQ+ (Bhalgat et al. 2020): only values out of range move with it.
    """
    need_x, need_scale, need_zero_point, need_smooth = needs
    v, codes, clamped = _codes(x, scale, zero_point, smooth, bits)
    grad, inside, whole = grad.float(), codes == clamped, scale.dim() >= x.dim()
    through = torch.where(inside, grad, 0)
    grad_x, grad_scale, grad_zero_point, grad_smooth = (grad.new_empty(0) for _ in range(4))
    if need_x:
        grad_x = (through if smooth is None else through * smooth.float()).contiguous()
    if need_scale:
        grad_scale = (grad * (clamped - torch.where(inside, v, 0))).sum(-1, whole).sum_to_size(scale.shape)
    if need_zero_point:
        grad_zero_point = (-scale.float() * torch.where(inside, 0, grad).sum(-1, whole)).sum_to_size(scale.shape)
    if need_smooth:
        by_row = through * x.float()
        grad_smooth = by_row.flatten(0, -2).sum(0) if x.dim() > 1 else by_row
    smooth_dtype = x.dtype if smooth is None else smooth.dtype
    return grad_x.to(x.dtype), grad_scale.to(scale.dtype), grad_zero_point, grad_smooth.to(smooth_dtype)


define(f"fake_quantize({_INPUTS}) -> Tensor", fake_quantize, _SHAPES, _fake, gradient=_gradient)
define(
    f"fake_quantize_backward(Tensor grad, {_INPUTS}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake_quantize_backward,
    f"{_SHAPES}; grad float =x",
    _backward_fake,
    checks=(_check_needs,),
)
