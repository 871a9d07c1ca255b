"""Configs by name: the recipes of `ptq4vm.recipes`, and ablations, each a recipe with one thing less or more."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ptq4vm.config import QuantConfig
from ptq4vm.recipes import RECIPES

KSCALED = ("state_naive", "state", "kscaled_naive", "kscaled_linears", "kscaled", "ptq4vm+state")
"""Recipes of the second paper, and the mix of both."""

LADDER = tuple(name for name in RECIPES if name not in ("best", *KSCALED))


ABLATIONS: dict[str, dict[str, Any]] = {
    "best-smoothing": {"smoothing": None},
    "best-truncation": {"range_search": False},
    "best-per_token": {"activations": {"granularity": "per_tensor"}},
    "best-rotation": {"rotation": False},
    "best-gptq": {"gptq": False},
    "best-mirror": {"mirror": False},
    "best-learning": {"learning": None},
    "best-fisher": {"learning": {"loss": "cosine"}},
    "best+smooth_scales": {"learning": {"smooth_rate": 1e-2}},
    "best+out_proj_8bit": {"eight_bit": ("*.out_proj",)},
    "best+x_proj_dt_proj_8bit": {"eight_bit": ("*.x_proj*", "*.dt_proj*")},
    "minmax+class_token": {"class_token_in_float": True},
    "kscaled-k_scaled": {"outputs": {"k_scaled": False}},
    "state+powers": {"state": {"factors": "powers"}},
    "kscaled+powers": {"state": {"factors": "powers"}},
    "kscaled-reparameterization": {"state": {"factors": None}},
    "kscaled-integration": {"state": {"integrate": False}},
}
"""Changes of recipes: one thing less or more."""


def base_of(recipe: str) -> str:
    """Returns the recipe that an ablation changes."""
    return re.split("[-+]", recipe)[0] if recipe in ABLATIONS else recipe


def config_of(recipe: str, bits: int, seed: int, epochs: int | None) -> QuantConfig:
    """A recipe or an ablation; `epochs` in place of the preset's."""
    config = QuantConfig.recipe(base_of(recipe), bits, seed=seed, **ABLATIONS.get(recipe, {}))
    if epochs is None or config.learning is None:
        return config
    return dataclasses.replace(config, learning=dataclasses.replace(config.learning, epochs=epochs))
