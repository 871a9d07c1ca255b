"""Depth-wise convolutions of maps in one pass with SiLU and the codes of K scan directions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.ops._arguments import Values
from ptq4vm.ops._define import define
from ptq4vm.ops.convolution_1d import DIRECTIONS_SHAPES, directions_codes
from ptq4vm.ops.quantization import QPARAMS, QParams


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, inv_scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((inv_scale.shape[0], *x.shape), dtype=torch.int8)


def _check_map(values: Values) -> None:
    height, width, tokens = values["height"], values["width"], values["x"].shape[1]
    if height < 0 or width < 0:
        raise ValueError(f"height and width must not be negative, they are {height} and {width}")
    if height * width != tokens:
        raise ValueError(f"a map of height {height} and width {width} has not the {tokens} tokens of x")
    rows, columns = values["weight"].shape[1:]
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(f"a kernel of {rows} by {columns} has no middle: both must be odd")


def conv2d_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, *qparams: *QParams
) -> tuple[Tensor, Tensor]:
    """Returns the convolution and SiLU of maps x (B, H·W, E), and its codes for K directions (K, B, H·W, E).

    weight (E, rows, columns), both odd: zero padding keeps the size. The first result is (B, H·W, E) in x's dtype.
    """
    maps = x.float().unflatten(1, (height, width)).permute(0, 3, 1, 2)
    padding = (weight.shape[1] // 2, weight.shape[2] // 2)
    kernel, start = weight.float().unsqueeze(1), None if bias is None else bias.float()
    y = F.silu(F.conv2d(maps, kernel, start, padding=padding, groups=weight.shape[0]))
    y = y.permute(0, 2, 3, 1).flatten(1, 2)
    return y.to(x.dtype).contiguous(), directions_codes(y.unsqueeze(0), *qparams)


define(
    f"conv2d_quantize(Tensor x, Tensor weight, Tensor? bias, int height, int width, {QPARAMS}) -> (Tensor, Tensor)",
    conv2d_quantize,
    f"x float B L E; weight float E rows columns; bias float E; {DIRECTIONS_SHAPES}",
    _fake,
    checks=(_check_map,),
)
