"""Models made hard to quantize without changing what they compute.

Published Visual Mambas have activation channels far larger than the rest; small models trained on small images have
few. A channel can grow while the function stays where a norm's weight (and bias) stands against the columns of the
linear that reads it, and where a row of x_proj (its step part, which is linear up to dt_proj) stands against the
columns of dt_proj. Factors are powers of two, so that nothing is even rounded.

Tokens cannot be rescaled in the same way: every path between two linears passes a norm, a SiLU or a GELU, which a
factor that differs between tokens would change; the differences between tokens are those that training gave the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq4vm.models.hierarchical import SS2D, VSSBlock
from ptq4vm.models.isotropic import Block

CHANNEL_FACTORS = (64.0, 32.0, 16.0)
"""Of three channels of every norm's output that a linear reads."""
DT_FACTOR = 16.0
"""Of one channel of every dt_proj input."""


@torch.no_grad()
def inject_outliers(model: nn.Module, seed: int = 0) -> None:
    """Rescales a Vim, LocalVim, VMamba or LocalVMamba in place; `seed` chooses the channels."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.modules():
        if isinstance(block, Block):
            _grow(block.norm, block.mixer.in_proj, generator)
            _grow_plain_steps(block.mixer, generator)
        elif isinstance(block, VSSBlock):
            assert isinstance(block.op, SS2D)
            _grow(block.norm, block.op.in_proj, generator)
            _grow_stacked_steps(block.op, generator)
            _grow(block.op.out_norm, block.op.out_proj, generator)
            if block.mlp is not None:
                _grow(block.norm2, block.mlp.fc1, generator)


def _grow(norm: Any, linear: Any, generator: torch.Generator) -> None:
    factors = torch.ones_like(norm.weight)
    chosen = torch.randperm(len(factors), generator=generator)[: len(CHANNEL_FACTORS)]
    factors[chosen] = torch.tensor(CHANNEL_FACTORS)
    norm.weight *= factors
    if getattr(norm, "bias", None) is not None:
        norm.bias *= factors
    linear.weight /= factors


def _grow_plain_steps(mixer: Any, generator: torch.Generator) -> None:
    for suffix in mixer.directions:
        x_proj, dt_proj = (mixer.get_submodule(name + suffix) for name in ("x_proj", "dt_proj"))
        factors = _step_factors(dt_proj.in_features, generator)
        x_proj.weight[: len(factors)] *= factors.unsqueeze(1)
        dt_proj.weight /= factors


def _grow_stacked_steps(op: SS2D, generator: torch.Generator) -> None:
    for x_proj, dt_proj in zip(op.x_proj_weight, op.dt_projs_weight, strict=True):
        factors = _step_factors(dt_proj.shape[1], generator)
        x_proj[: len(factors)] *= factors.unsqueeze(1)
        dt_proj /= factors


def _step_factors(rank: int, generator: torch.Generator) -> Tensor:
    factors = torch.ones(rank)
    factors[torch.randint(rank, (), generator=generator)] = DT_FACTOR
    return factors
