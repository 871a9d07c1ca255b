"""Norms in one pass with the residual before them and the codes after them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.ops._arguments import Values
from ptq4vm.ops._define import define
from ptq4vm.ops.quantization import QPARAMS, QPARAMS_SHAPES, QParams
from ptq4vm.ops.rotation import quantize_output


def _fake(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0 if residual is None else x.shape, dtype=torch.float32)
    return total, x.new_empty(x.shape, dtype=torch.int8)


def _check_rms(values: Values) -> None:
    if values["rms"] and values["bias"] is not None:
        raise ValueError("an RMS norm has no bias")


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
    """Returns x + residual in float32 (empty without one), and the codes of its RMS or layer norm, maybe rotated."""
    total = x.float() if residual is None else x.float() + residual.float()
    shape = total.shape[-1:]
    weight, bias = (None if value is None else value.float() for value in (weight, bias))
    normed = F.rms_norm(total, shape, weight, eps) if rms else F.layer_norm(total, shape, weight, bias, eps)
    codes = quantize_output(normed, rotated, *qparams)
    return total.new_empty(0) if residual is None else total, codes


define(
    f"norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, bool rotated, "
    f"{QPARAMS}) -> (Tensor, Tensor)",
    norm_quantize,
    f"x float ... D; residual float =x; weight float D; bias float D; {QPARAMS_SHAPES}",
    _fake,
    checks=(_check_rms,),
)
