"""Configs by name: the recipes of `ptq4vm.config.RECIPES`, and ablations, each a recipe with one thing less or more."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from ptq4vm.config import RECIPES, Factors, Granularity, Loss, Outputs, QuantConfig, State

KSCALED = ("state_naive", "state", "kscaled_naive", "kscaled_linears", "kscaled", "ptq4vm+state")
"""Recipes of the second paper, and the mix of both."""

LADDER = tuple(name for name in RECIPES if name not in ("best", *KSCALED))


def learns(**changes: Any) -> Callable[[QuantConfig], QuantConfig]:
    """Changes a part of a recipe's learning."""

    def change(config: QuantConfig) -> QuantConfig:
        assert config.learning is not None
        return dataclasses.replace(config, learning=dataclasses.replace(config.learning, **changes))

    return change


def with_(**changes: Any) -> Callable[[QuantConfig], QuantConfig]:
    return functools.partial(dataclasses.replace, **changes)


ABLATIONS: dict[str, Callable[[QuantConfig], QuantConfig]] = {
    "best-smoothing": with_(smoothing=None),
    "best-truncation": with_(range_search=False),
    "best-per_token": with_(granularity=Granularity.PER_TENSOR),
    "best-rotation": with_(rotation=False),
    "best-gptq": with_(gptq=False),
    "best-mirror": with_(mirror=False),
    "best-learning": with_(learning=None),
    "best-fisher": learns(loss=Loss.COSINE),
    "best+smooth_scales": learns(smooth_rate=1e-2),
    "best+out_proj_8bit": with_(eight_bit=("*.out_proj",)),
    "best+x_proj_dt_proj_8bit": with_(eight_bit=("*.x_proj*", "*.dt_proj*")),
    "minmax+class_token": with_(class_token_in_float=True),
    "kscaled-k_scaled": with_(outputs=Outputs(k_scaled=False)),
    "state+powers": with_(state=State(factors=Factors.POWERS)),
    "kscaled+powers": with_(state=State(factors=Factors.POWERS)),
    "kscaled-reparameterization": with_(state=State(factors=None)),
    "kscaled-integration": with_(state=State(integrate=False)),
}


def base_of(recipe: str) -> str:
    """Returns the recipe that an ablation changes."""
    return re.split("[-+]", recipe)[0] if recipe in ABLATIONS else recipe


def config_of(recipe: str, bits: int, seed: int, epochs: int | None) -> QuantConfig:
    """Returns the config of a recipe or an ablation, with `epochs` in place of the recipe's where it learns."""
    config = QuantConfig.recipe(base_of(recipe), bits, seed=seed)
    if epochs is not None and config.learning is not None:
        config = learns(epochs=epochs)(config)
    return ABLATIONS[recipe](config) if recipe in ABLATIONS else config
