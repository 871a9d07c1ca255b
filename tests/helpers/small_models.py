"""Models of two residual blocks, small enough to be calibrated in a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4vm import Learning, QuantConfig
from ptq4vm.quantization_specs import Loss

LEARNED = QuantConfig.w4a4(learning=Learning(epochs=1, batch_size=4))
BEST = QuantConfig.w4a4(best=True, mirror=False, learning=Learning(epochs=1, batch_size=4, loss=Loss.FISHER))


class Block(nn.Module):
    """x + gain · fc2(act(fc1(norm(x))) · scale) with a scalar parameter and a buffer."""

    def __init__(self, width: int, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), act
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("scale", torch.ones(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.fc2(self.act(self.fc1(self.norm(x))) * self.scale)


class Raw(nn.Module):
    """Two linears that read the block's input as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.a(x)) * self.b(x)


class Blocks(nn.Module):
    """Two blocks and a head for x (B, L, 8), connected by `flow(model, x)`; in a row by default."""

    def __init__(self, block: Callable[[int], nn.Module] = Block, flow: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(8), block(8)])
        self.head = nn.Linear(8, 3)
        self.flow = flow

    def forward(self, x: Tensor) -> Any:
        if self.flow is not None:
            return self.flow(self, x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def blocks(**options: Any) -> Blocks:
    """With the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Blocks(**options).eval()
