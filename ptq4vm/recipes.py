"""Recipes by name: the settings of each in a config, as data without torch, so that `--help` can list them.

A table with keys of 2 to 8 stands for its entry at the requested number of bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRESETS = {"w8a8": ("ptq4vm", 8), "w6a6": ("ptq4vm", 6), "w4a4": ("ptq4vm", 4)}
"""Recipe and bits of the names that need no bits."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named change of the default config."""

    name: str
    description: str
    """One line of plain ASCII."""
    settings: Mapping[str, Any]
    """As `QuantConfig.from_dict` takes them, besides the bits of weights and activations."""


_LEARNING = {"epochs": {8: 10, 7: 50, 6: 50, 5: 100, 4: 100, 3: 100, 2: 100}}
"""PTQ4VM table 7 has the epochs at 8, 6 and 4 bits; other numbers of bits take those of the next lower one."""
_RELEASED = {
    **_LEARNING,
    "batch_size": 256,
    "scale_rate": 5e-3,
    "smooth_rate": 1e-2,
    "only": ("*.in_proj", "*.out_proj", "*.fc1", "*.fc2"),
}
"""The released code: x_proj and dt_proj run without gradients, all images form one batch, and its rates change the
scales themselves; here they are relative to scales of about 0.1."""
_BEST = {"epochs": 10, "loss": "fisher", "scale_rate": 1e-2, "smooth_rate": 0.0}

_PER_TENSOR = {"activations": {"granularity": "per_tensor"}}
_MINMAX = {"range_search": "minmax"}
_KSCALED = {
    "weights": {"granularity": "per_tensor"},
    "activations": {"granularity": "per_tensor", "symmetric": True},
    "smoothing": None,
}
_KSCALED_TOKEN = {**_KSCALED, "activations": {"granularity": "k_scaled_token", "symmetric": True}}
_NAIVE_STATE = {"factors": None, "per_token": False}

_ALL = (
    Recipe(
        "minmax",
        "PTQ4VM's baseline: a static minimum-to-maximum range per activation tensor",
        {**_PER_TENSOR, **_MINMAX, "smoothing": None},
    ),
    Recipe("smoothquant", "minmax after smoothing (SmoothQuant)", {**_PER_TENSOR, **_MINMAX}),
    Recipe("per_tensor", "ptq4vm with one scale per activation tensor", {**_PER_TENSOR, "learning": _LEARNING}),
    Recipe(
        "per_token_dynamic",
        "ptq4vm with scales of tokens found at run time, so without truncation",
        {**_MINMAX, "activations": {"granularity": "per_token_dynamic"}, "learning": _LEARNING},
    ),
    Recipe("pts", "smoothing, and a static scale per token position", _MINMAX),
    Recipe("pts+truncation", "pts with the ranges of least squared error", {}),
    Recipe("ptq4vm", "PTQ4VM: pts+truncation, then joint learning of the scales", {"learning": _LEARNING}),
    Recipe(
        "ptq4vm_released", "PTQ4VM as its released code does it", {"range_search": "released", "learning": _RELEASED}
    ),
    Recipe(
        "best",
        "past the paper: ptq4vm with a rotation, GPTQ, mirror images and a Fisher loss",
        {"rotation": True, "gptq": True, "mirror": True, "learning": _BEST},
    ),
    Recipe(
        "kscaled",
        "the k-scaled paper: linears, convolutions, activations and the scans' hidden state",
        {**_KSCALED, "outputs": {}, "state": {}, "bias_correction": True},
    ),
    Recipe(
        "kscaled_naive",
        "kscaled's baseline: one minimum-to-maximum range per tensor",
        {**_KSCALED, **_MINMAX, "outputs": {"k_scaled": False}, "state": _NAIVE_STATE},
    ),
    Recipe(
        "kscaled_linears",
        "kscaled's linears alone, with scales for clusters of tokens",
        {**_KSCALED_TOKEN, "bias_correction": True},
    ),
    Recipe("state", "the scans' hidden state alone", {"exclude": ("*",), "state": {}}),
    Recipe(
        "state_naive",
        "state's baseline: one minimum-to-maximum range",
        {**_MINMAX, "exclude": ("*",), "state": _NAIVE_STATE},
    ),
    Recipe("ptq4vm+state", "ptq4vm, and the scans' hidden state", {"learning": _LEARNING, "state": {}}),
)
RECIPES = {recipe.name: recipe for recipe in _ALL}


def settings_at(name: str, bits: int) -> dict[str, Any]:
    """Returns what a recipe sets at a number of bits."""
    both = {"bits": bits}
    return merged({"weights": both, "activations": both}, _at(RECIPES[name].settings, bits))


def _at(value: Any, bits: int) -> Any:
    if not isinstance(value, Mapping):
        return value
    return value[bits] if bits in value else {key: _at(each, bits) for key, each in value.items()}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with `changes`; a mapping changes only those keys of another that it has."""
    nested = {
        key: merged(base[key], value)
        for key, value in changes.items()
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    return {**base, **changes, **nested}


def parse(text: str) -> tuple[str, int] | None:
    """Returns the recipe and the bits that `w8a8` or `best4` stands for; None for what names no recipe."""
    found = re.fullmatch(r"(.+?)(\d)", text)
    if text in PRESETS or found is None or found[1] not in RECIPES:
        return PRESETS.get(text)
    return found[1], int(found[2])
