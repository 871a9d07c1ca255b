"""A small model with buffers, its weights, and files of them."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from ptq4vm.models.checkpoints import open_checkpoint


class Tiny(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)  # buffers too, one of them a scalar
        self.head = nn.Linear(4, classes)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in Tiny().state_dict().items()}
    return {name: torch.randint(-9, 9, shape, generator=generator).float() for name, shape in shapes.items()}


def filled() -> Tiny:
    model = Tiny()
    model.load_state_dict(weights(7))
    return model


def prefixed(prefix: str, state: dict) -> OrderedDict:
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_checkpoint(path: Path, ema: bool = False) -> dict[str, torch.Tensor]:
    return open_checkpoint(path, ema=ema).weights
