"""Small models of many kinds, with inputs, which a saved folder must bring back."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.public_models import MAMBA_VISION_NANO, NANO, SHORT
from helpers.strategies import normal
from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.models import MambaVision

Maps = namedtuple("Maps", "early late")


class Block(nn.Module):
    def __init__(self, dim: int, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.norm, self.activation = nn.LayerNorm(dim, eps=0.3), activation
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.activation(self.fc1(self.norm(x))))


class Tokens(nn.Module):
    """Two blocks on tokens (B, 5, 8); subclasses add the parts before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(8), Block(8, lambda x: 3 * torch.sin(x))])
        self.head = nn.Linear(8, 3)

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).mean(1))


class Words(Tokens):
    """Takes integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(self.embed(words))


class Pair(Tokens):
    """Takes two inputs of different types, and returns outputs of several kinds."""

    def forward(self, x: Tensor, keep: Tensor) -> Any:
        x = torch.where(keep.unsqueeze(-1), x, float("-inf")).softmax(-1).nan_to_num()
        y = self.body(x)
        total = y.sum(-1, dtype=torch.float64)
        return {
            "maps": Maps(x, [y]),
            "all": OrderedDict(last=(total, self.head(y))),
            "classes": self.head(y).argmax(-1),
        }


class Constants(Tokens):
    """Has buffers that are not persistent, complex ones, and one tensor in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position", torch.linspace(0, 1, 8), persistent=False)
        self.register_buffer("filter", torch.polar(torch.ones(5), torch.linspace(0, 3, 5)))
        self.layers[1].fc1.weight = self.layers[0].fc1.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.fft.irfft(torch.fft.rfft(x + self.position) * self.filter, 8))


class Picture(Tokens):
    """Has a stem whose weights lie channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4).to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(self.stem(image).flatten(2).mT)


class Raw(nn.Module):
    """Has linears, also in different blocks, that read one input as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a-{a}'": nn.Linear(8, 8), "by b": nn.Linear(8, 8)}) for _ in "12")

    def forward(self, x: Tensor) -> Tensor:
        first, second = ([module(x) for module in layer.values()] for layer in self.layers)
        return first[0] * first[1] + second[0].tanh() * second[1]


def _named(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **options)


def _by_hand() -> nn.Module:
    """Returns a model that differs from its name in head, epsilon and activation."""
    model = _named("vim_nano_patch4_32", depth=1)
    model.head = nn.Sequential(nn.Linear(model.head.in_features, 7), nn.Hardswish())
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.25
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "words": (Words, lambda: (torch.arange(20).view(4, 5) % 11,)),
    "pair": (Pair, lambda: (normal(4, 5, 8), torch.arange(20).view(4, 5) % 3 > 0)),
    "constants": (Constants, lambda: (normal(4, 5, 8),)),
    "picture": (Picture, lambda: (normal(4, 3, 8, 12),)),
    "raw": (Raw, lambda: (normal(4, 5, 8),)),
    "by hand": (_by_hand, lambda: (normal(4, 3, 32, 32),)),
    "deit": (
        lambda: _named("deit_tiny_patch16_224", depth=1, img_size=32, num_classes=7),
        lambda: (normal(4, 3, 32, 32),),
    ),
    "swin": (
        lambda: _named(
            "swin_tiny_patch4_window7_224",
            depths=(1, 2),
            num_heads=(2, 4),
            embed_dim=16,
            img_size=56,
            num_classes=7,
        ),
        lambda: (normal(4, 3, 56, 56),),
    ),
    "mamba vision": (lambda: MambaVision(**MAMBA_VISION_NANO), lambda: (normal(4, 3, 96, 72),)),
    **{name: (lambda name=name: _named(name, **SHORT[name]), lambda: (normal(4, 3, 32, 32),)) for name in NANO},
}
"""Models, each with inputs of batch four."""


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    make, inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval(), inputs()


CONFIG = {"weights": {"bits": 4}, "smoothing": None, "range_search": False}


def quantized_model(name, config=None):
    model, inputs = made(name)
    prepared = prepare(model, inputs, config or QuantConfig(**CONFIG))
    calibrate(prepared, [inputs], progress=False)
    return convert(prepared), inputs
