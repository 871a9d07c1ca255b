"""How our models enter timm's registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

PRETRAINED = Path(__file__).parent / "pretrained"

NOT_ARCHITECTURE = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""What timm passes on beside the arguments of the model."""


def imagenet(first_conv: str, classifier: str, **changes: Any) -> dict[str, Any]:
    """timm's description of a model for 224×224 images: preprocessing, and the names of its ends."""
    base = {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
    }
    return base | changes


def digits(first_conv: str, classifier: str, file: str) -> dict[str, Any]:
    """The same for a bundled model that reads scikit-learn's digits."""
    return _small_images(first_conv, classifier, file, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def cifar10(first_conv: str, classifier: str, file: str) -> dict[str, Any]:
    """The same for a bundled model of CIFAR-10."""
    return _small_images(first_conv, classifier, file, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


def _small_images(
    first_conv: str, classifier: str, file: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Any]:
    changes: dict[str, Any] = {"num_classes": 10, "input_size": (3, 32, 32), "crop_pct": 1.0, "mean": mean, "std": std}
    return imagenet(first_conv, classifier, file=str(PRETRAINED / file), **changes)


def create(
    model_class: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    defaults: dict[str, Any],
    changes: dict[str, Any],
    features: Callable[..., nn.Module] | None = None,
) -> Any:
    """The model that timm's `create_model` returns; `features` makes a backbone of it for `features_only=True`.

    Its attribute `model_args` holds the arguments it was asked for, so that a saved model can be made again.
    """
    if changes.get("features_only") and features is None:
        raise ValueError(f"{name} has one resolution and no feature maps: features_only is for hierarchical models")
    feature_cfg = {"feature_cls": features, "out_indices": None}  # of all stages
    model: Any = build_model_with_cfg(model_class, name, pretrained, feature_cfg=feature_cfg, **(defaults | changes))
    model.model_args = {key: value for key, value in changes.items() if key not in NOT_ARCHITECTURE}
    return model
