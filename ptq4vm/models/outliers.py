"""Injects outlier channels, which are hard to quantize, and leaves the function of a model as it is.

Published Visual Mambas have activation channels far larger than the rest; small models trained on small images have
few. A channel can grow and leave the function as it is in two places: a norm's weight (and bias) against the columns
of the linear that reads the norm, and a row of x_proj (its dt part, which is linear up to dt_proj) against the columns
of dt_proj. Factors are powers of two, so nothing is rounded.

Tokens cannot be rescaled in the same way: every path between two linears passes a norm, a SiLU or a GELU, which a
factor per token would change. Differences between tokens remain as training made them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq4vm.models.hierarchical import VSSBlock
from ptq4vm.models.isotropic import Block

CHANNEL_FACTORS = (64.0, 32.0, 16.0)
"""Factors of three channels of each norm's output."""
DT_FACTOR = 16.0
"""Factor of one channel of each dt_proj's input."""


@torch.no_grad()
def inject_outliers(model: nn.Module, seed: int = 0) -> None:
    """Rescales channels of a Vim, LocalVim, VMamba or LocalVMamba in place; the outputs stay bit for bit.

    Args:
        model: any module; blocks of other models are left alone.
        seed: chooses the channels.

    Example:
        >>> import timm, ptq4vm.models
        >>> model = timm.create_model("vim_nano_patch4_32.digits", pretrained=True)
        >>> before = model.layers[0].norm.weight.clone()
        >>> inject_outliers(model)
        >>> (model.layers[0].norm.weight / before).unique().tolist()
        [1.0, 16.0, 32.0, 64.0]
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.modules():
        if isinstance(block, Block):
            mixer: Any = block.mixer
            _scale_norm(block.norm, mixer.in_proj, generator)
            for suffix in mixer.directions:
                x_proj, dt_proj = (mixer.get_submodule(name + suffix).weight for name in ("x_proj", "dt_proj"))
                _scale_dt(x_proj, dt_proj, generator)
        elif isinstance(block, VSSBlock):
            op: Any = block.op
            _scale_norm(block.norm, op.in_proj, generator)
            for x_proj, dt_proj in zip(op.x_proj_weight, op.dt_projs_weight, strict=True):
                _scale_dt(x_proj, dt_proj, generator)
            _scale_norm(op.out_norm, op.out_proj, generator)
            if block.mlp is not None:
                _scale_norm(block.norm2, block.mlp.fc1, generator)


def _scale_norm(norm: Any, linear: Any, generator: torch.Generator) -> None:
    """Scales channels of a norm's output, and the columns of the linear that reads it by the inverse."""
    factors = torch.ones_like(norm.weight)
    chosen = torch.randperm(len(factors), generator=generator)[: len(CHANNEL_FACTORS)]
    factors[chosen] = torch.tensor(CHANNEL_FACTORS)
    norm.weight *= factors
    if getattr(norm, "bias", None) is not None:
        norm.bias *= factors
    linear.weight /= factors


def _scale_dt(x_proj: Tensor, dt_proj: Tensor, generator: torch.Generator) -> None:
    """Scales one row of x_proj (R + 2S, E), and the column of dt_proj (E, R) that reads it by the inverse."""
    row = torch.randint(dt_proj.shape[1], (), generator=generator)
    x_proj[row] *= DT_FACTOR
    dt_proj[:, row] /= DT_FACTOR
