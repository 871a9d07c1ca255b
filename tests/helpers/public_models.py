"""Public models by their timm names, facts about their checkpoints, and small versions of them."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden.fill import fill_state_dict
from torch import nn

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from ptq4vm.models import local_vim, local_vmamba

GOLDEN = Path(__file__).parents[1] / "golden"

FILES = {
    "vim_tiny_patch16_224": "vim_tiny",
    "vim_small_patch16_224": "vim_small",
    "vim_base_patch16_224": "vim_base",
    "local_vim_tiny": "local_vim_tiny",
    "local_vim_tiny_middle_cls": "local_vim_tiny_cls",
    "local_vim_small": "local_vim_small",
    "local_vim_small_searched": "local_vim_small_searched",
    "vmamba_tiny_s1l8": "vmamba_tiny",
    "vmamba_tiny_s2l5": "vmamba_tiny_s2l5",
    "vmamba_small_s2l15": "vmamba_small",
    "vmamba_small_s1l20": "vmamba_small_s1l20",
    "vmamba_base_s2l15": "vmamba_base",
    "vmamba_base_s1l20": "vmamba_base_s1l20",
    "local_vmamba_tiny": "local_vmamba_tiny",
    "local_vmamba_small": "local_vmamba_small",
    "mamba_vision_T": "mamba_vision_t",
    "mamba_vision_T2": "mamba_vision_t2",
    "mamba_vision_S": "mamba_vision_s",
    "mamba_vision_B": "mamba_vision_b",
    "mamba_vision_L": "mamba_vision_l",
    "mamba_vision_L2": "mamba_vision_l2",
}
"""Names of the models in the files of golden/."""

BACKBONES = (
    "vmamba_tiny_s1l8",
    "vmamba_small_s2l15",
    "vmamba_base_s2l15",
    "local_vmamba_tiny",
    "local_vmamba_small",
    "mamba_vision_T",
)
MICRO = ("vim_micro_patch4_32", "local_vim_micro_patch4_32", "vmamba_micro_32", "local_vmamba_micro_32")
NANO = ("vim_nano_patch4_32", "local_vim_nano_patch4_32", "vmamba_nano_32", "local_vmamba_nano_32")
"""Models for 32×32 images, one of each family."""


def slow_but(fast: Collection[str], names: Iterable[str]) -> list[Any]:
    """Returns all names for `parametrize`; names that are not `fast` are slow tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


SAMPLED = slow_but(("vim_nano_patch4_32", "vmamba_nano_32"), NANO)
"""Small models for `parametrize`: Vim and VMamba every time, the Local ones in slow tests."""

SHORT: dict[str, dict[str, Any]] = {
    "vim_nano_patch4_32": {"depth": 1},
    "local_vim_nano_patch4_32": {"directions": local_vim.NANO[:2]},
    "vmamba_nano_32": {"depths": (1, 1)},
    "local_vmamba_nano_32": {"depths": (1, 1), "directions": local_vmamba.NANO[:2]},
}
"""Arguments that leave the small models few blocks."""


def facts(name: str, features_only: bool = False) -> dict[str, Any]:
    """Returns names and shapes of the public checkpoint's tensors, and the linears that the paper quantizes."""
    file = FILES[name] + ("_det" if features_only else "")
    return json.loads(gzip.decompress((GOLDEN / f"{file}.json.gz").read_bytes()))


def shrunken(name: str) -> dict[str, Any]:
    """Returns arguments that keep the first block of every stage (two blocks of an isotropic model)."""
    if name.startswith("vim"):
        return {"depth": 2}
    if name.startswith("local_vim"):
        table = local_vim.FIXED if name == "local_vim_small" else local_vim.SEARCHED
        return {"directions": table[:2]}
    if name.startswith(("vmamba", "mamba_vision")):
        return {"depths": (1, 1, 1, 1)}
    table, last = (local_vmamba.TINY, 13) if name == "local_vmamba_tiny" else (local_vmamba.SMALL, 31)
    return {"depths": (1, 1, 1, 1), "directions": [table[i] for i in (0, 2, 4, last)]}


MAMBA_VISION_NANO: dict[str, Any] = {
    "num_classes": 10,
    "embed_dim": 16,
    "stem_dim": 8,
    "depths": (1, 1, 3, 2),
    "heads": (1, 2, 4, 8),
    "windows": (8, 8, 4, 3),
    "mlp_ratio": 2.0,
    "layer_scale": 0.5,
}
"""Arguments of a small MambaVision with mixers and attention in several windows."""


def kept(linear: str) -> bool:
    """Whether a linear of the whole model is in the shrunken one."""
    return linear.startswith(("layers.0.mixer.", "layers.1.mixer.")) or ".blocks.0." in linear


def filled(model: nn.Module) -> nn.Module:
    """Returns the model in evaluation mode, with weights that depend on their names and shapes alone."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in fill_state_dict(shapes).items()})
    return model.eval()


def create(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options)


def order(name: str, height: int, width: int) -> list[int | None]:
    """Returns the tokens in the order of a direction, by its definition; None is padding."""
    path, _, flip = name.partition("_")
    if path == "h":
        places = list(itertools.product(range(height), range(width)))
    elif path == "v":
        places = [(i, j) for j in range(width) for i in range(height)]
    else:
        k = int(path[1:])
        corners = itertools.product(range(0, height, k), range(0, width, k))
        places = [(a + i, b + j) for a, b in corners for i in range(k) for j in range(k)]
    tokens = [i * width + j if i < height and j < width else None for i, j in places]
    return tokens[::-1] if flip else tokens
