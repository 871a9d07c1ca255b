"""Norms of `mamba_ssm.ops.triton`, which add a residual before they normalize.

Computed in float32, and returned in x's dtype; the sum is returned too with `prenorm`, in the residual's dtype.
Releases differ in the order of what follows `residual`, so it is read by keyword.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4vm.authors.refusals import refuse_arguments

_Norm = Tensor | tuple[Tensor, Tensor]
_OTHERS = "parallel blocks and dropout are of language models"


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    dropout_p: float = 0.0,
    **others: Any,
) -> _Norm:
    """Normalizes x + residual by its root mean square."""
    refuse_arguments("rms_norm_fn", _OTHERS, dropout_p=dropout_p or None, **others)
    total, kept = _sum(x, residual, residual_in_fp32)
    return _results(_rms_norm(total, weight, bias, eps), kept, x, prenorm)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    dropout_p: float = 0.0,
    **others: Any,
) -> _Norm:
    """Normalizes x + residual by its mean and deviation, or as `rms_norm_fn` where told."""
    refuse_arguments("layer_norm_fn", _OTHERS, dropout_p=dropout_p or None, **others)
    total, kept = _sum(x, residual, residual_in_fp32)
    norm = _rms_norm if is_rms_norm else _layer_norm
    return _results(norm(total, weight, bias, eps), kept, x, prenorm)


class RMSNorm(nn.Module):
    """Holds a weight (E,) and calls `rms_norm_fn`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse_arguments("RMSNorm", _OTHERS, dropout_p=dropout_p or None)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> _Norm:
        options = {"eps": self.eps, "prenorm": prenorm, "residual_in_fp32": residual_in_fp32}
        return rms_norm_fn(x, self.weight, self.bias, residual, **options)  # type: ignore[arg-type]


def _rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return y if bias is None else y + bias


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def _sum(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """Returns the sum in the type to compute with, and in the type that the next block gets."""
    kind = torch.promote_types(x.dtype, torch.float32)
    if residual is None:
        return x.to(kind), x.to(kind) if residual_in_fp32 else x
    total = x.to(kind) + residual.to(kind)
    return total, total.to(residual.dtype)


def _results(y: Tensor, kept: Tensor, x: Tensor, prenorm: bool) -> _Norm:
    return (y.to(x.dtype), kept) if prenorm else y.to(x.dtype)
