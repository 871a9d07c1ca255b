"""What repositories of Visual Mambas import beside their models: packages of other frameworks, replaced by little.

Installed in the process of one repository alone (`authors_worker.py`), where the package is not there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn


class Anything:
    """A class, decorator and function that does nothing: decorating returns what is decorated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Anything()

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds bare packages, whose `__init__` is not run, and stubs, which have the names of `STUBS` and else nothing."""

    def __init__(self, bare: Sequence[str], stubs: Sequence[str]) -> None:
        self.bare, self.stubs = bare, stubs
        self.stubbed: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        stub = any(fullname == name or fullname.startswith(f"{name}.") for name in self.stubs)
        if not stub and fullname not in self.bare:
            return None
        self.stubbed += [fullname] if stub else []
        spec = importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        leaf = fullname.rpartition(".")[2]
        folders = [Path(folder) / leaf for folder in (sys.path if path is None else path)]
        spec.submodule_search_locations = [str(folder) for folder in folders if folder.is_dir()]
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(STUBS)


class Stub(ModuleType):
    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class BaseModule(nn.Module):
    """mmcv's module with a way to initialize, without it."""

    def __init__(self, init_cfg: object = None) -> None:
        super().__init__()


class AdaptivePadding(nn.Identity):
    """mmcv's padding up to whole patches, for images that have whole patches."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()

    def get_pad_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        return 0, 0


def build_norm_layer(cfg: Mapping[str, Any], channels: int, postfix: int | str = "") -> tuple[str, nn.Module]:
    return f"ln{postfix}", nn.LayerNorm(channels, eps=cfg.get("eps", 1e-5))


def resize_pos_embed(embedding: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The embedding as it is: images have the size that it was made for."""
    return embedding


STUBS: dict[str, Any] = {
    "AdaptivePadding": AdaptivePadding,
    "BaseModule": BaseModule,
    "ModuleList": nn.ModuleList,
    "build_dropout": lambda cfg: nn.Identity(),
    "build_norm_layer": build_norm_layer,
    "resize_pos_embed": resize_pos_embed,
    "to_2tuple": timm.layers.to_2tuple,
    "trunc_normal_": nn.init.trunc_normal_,
}
"""The names that models compute with; all others are `Anything`."""


class MambaBlock(nn.Module):
    def __init__(self, mixer: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(channels), mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class MambaClassifier(nn.Module):
    """Patches, layers of `mamba_ssm.Mamba`, a mean: what users build on that package."""

    def __init__(self, channels: int = 96, depth: int = 2) -> None:
        super().__init__()
        from mamba_ssm import Mamba

        self.patch_embed = nn.Conv2d(3, channels, 16, 16)
        self.layers = nn.ModuleList([MambaBlock(Mamba(channels), channels) for _ in range(depth)])
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class OneOutput(nn.Module):
    """A model of which one result counts."""

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)[self.index]


def noise(images: int, shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed))
