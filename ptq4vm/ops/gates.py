"""Gated sums of tokens in one pass with their codes. Shapes as in `quantization`, with K terms."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.ops._arguments import Values
from ptq4vm.ops._define import define
from ptq4vm.ops.quantization import QPARAMS, QParams, quantize


def _check_terms(values: Values) -> None:
    if not len(values["x"]):
        raise ValueError("x (K, B, L, E) has no term")


def gate_quantize(x: Tensor, gate: Tensor, silu: bool, *qparams: *QParams) -> Tensor:
    """Returns the codes (B, L, E) of Σ_k x_k · g_k in float32, added in the order of k.

    x is (K, B, L, E); g is gate, or with `silu` its SiLU: (K, B, L, E), or (K, B, 1, E) for all tokens of an image.
    inv_scale, zero_point are (L,) or (1,).
    """
    gates = F.silu(gate.float()) if silu else gate.float()
    products = [value.float() * factor for value, factor in zip(x, gates, strict=True)]
    return quantize(sum(products[1:], products[0]), *qparams)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[1:], dtype=torch.int8)


define(
    f"gate_quantize(Tensor x, Tensor gate, bool silu, {QPARAMS}) -> Tensor",
    gate_quantize,
    "x float K B L E; gate float K B L|1 E; inv_scale float L|1; zero_point zeros =inv_scale; inv_smooth float E; "
    "bits bits",
    _fake,
    checks=(_check_terms,),
)
