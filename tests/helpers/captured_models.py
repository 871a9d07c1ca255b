"""Models whose graphs have linears, blocks and stages of several kinds."""

import torch
from torch import nn

from helpers.strategies import normal
from ptq4vm.graph.capture import capture
from ptq4vm.passes.prepare.canonicalize import canonicalize


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Stage(nn.Module):
    def __init__(self, width: int, downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.downsample = nn.Linear(width, 2 * width) if downsample else nn.Identity()

    def forward(self, x):
        return self.downsample(self.blocks(x))


class Hierarchical(nn.Module):
    """`layers.0.blocks.1`, with a downsample between the stages and a residual stream beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.layers = nn.Sequential(Stage(4, True), Stage(8, False))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean(1))


def canonical(model: nn.Module, *examples: torch.Tensor) -> torch.fx.GraphModule:
    return canonicalize(capture(model, examples))


def tokens(images: int = 2, *, channels: int = 6, seed: int = 0) -> torch.Tensor:
    return normal(images, 5, channels, seed=seed)
