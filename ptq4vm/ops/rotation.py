"""Rotations that spread large channels over all of them, alone or in one pass with the codes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.ops._define import codes_like, define, like
from ptq4vm.ops.quantization import QPARAMS, QPARAMS_SHAPES, QParams, quantize

LARGEST_HARTLEY = 15
"""The largest odd factor of the number of channels that a rotation mixes; the kernel has the same number."""


def rotate(x: Tensor) -> Tensor:
    """Multiplies x (…, D) by an orthogonal matrix that is its own inverse; in x's type, computed in float32.

    With D = m · 2^a channels: Hadamard's transform of each run of 2^a, then Hartley's over the m runs if m is at most
    `LARGEST_HARTLEY` (QuaRot, Ashkboos et al. 2024, has Hadamard matrices of both sizes).
    """
    order = max(1, x.shape[-1] & -x.shape[-1])
    size = x.shape[-1] // order
    y = x.float().unflatten(-1, (size, order)) @ hadamard(order, x.device)
    if size <= LARGEST_HARTLEY:
        y = hartley(size, x.device) @ y
    return y.flatten(-2).to(x.dtype)


def hadamard(order: int, device: torch.device | None = None) -> Tensor:
    """Returns Sylvester's matrix (order, order) for a power of two, orthonormal."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(order)


def hartley(size: int, device: torch.device | None = None) -> Tensor:
    """Returns cos(2πjk / size) + sin(2πjk / size), (size, size), orthonormal and symmetric."""
    index = torch.arange(size, dtype=torch.float64, device=device)
    angles = 2 * math.pi / max(1, size) * (index.unsqueeze(1) * index)
    return ((angles.cos() + angles.sin()) / math.sqrt(max(1, size))).float()


def rotate_quantize(x: Tensor, gelu: bool, *qparams: *QParams) -> Tensor:
    """Returns the codes of the rotated x (…, D), or of its rotated GELU (the exact one): a stream's input."""
    return quantize_output(F.gelu(x.float()) if gelu else x.float(), True, *qparams)


def quantize_output(x: Tensor, rotated: bool, *qparams: *QParams) -> Tensor:
    """Returns the codes of x, or of its rotation, which smoothing precedes: it spreads a large channel over all."""
    inv_scale, zero_point, inv_smooth, bits = qparams
    if rotated:
        x, inv_smooth = rotate(x if inv_smooth is None else x * inv_smooth.float()), None
    return quantize(x, inv_scale, zero_point, inv_smooth, bits)


define(
    "rotate(Tensor x) -> Tensor",
    rotate,
    "x float ... D",
    like,
    gradient=lambda _, grad: torch.ops.ptq4vm.rotate(grad),
    save=None,
)
define(
    f"rotate_quantize(Tensor x, bool gelu, {QPARAMS}) -> Tensor",
    rotate_quantize,
    f"x float ... D; {QPARAMS_SHAPES}",
    codes_like,
)
