"""Registers the models of this package with timm."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

PRETRAINED = Path(__file__).parent / "pretrained"
"""Folder of the bundled weights, `<name>.<tag>.safetensors`."""

NOT_ARCHITECTURE = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of timm's `create_model` that are not arguments of the model."""

_IMAGENET: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}
_STATISTICS = {
    "digits": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
}
"""Mean and standard deviation of the pixels, by the dataset, with which the tags of bundled weights begin."""


def register(
    model_class: type[nn.Module],
    sizes: Mapping[str, Mapping[str, Any]],
    bundled: Mapping[str, Sequence[str]],
    features: Callable[..., nn.Module] | None = None,
    **ends: str,
) -> None:
    """Adds the models of a family to timm's registry, and their preprocessing to the module of their class.

    Args:
        model_class: class of the models.
        sizes: arguments of the class by the name of the model.
        bundled: tags of the bundled weights by model; these models take 32×32 images of 10 classes, the others
            ImageNet's, 224×224.
        features: makes a backbone of a model, for `features_only=True`.
        ends: names of the parts at both ends of the model, `first_conv` and `classifier`.
    """
    module: Any = sys.modules[model_class.__module__]
    cfgs: Any = {name: _IMAGENET | ends for name in sizes if name not in bundled}
    cfgs |= {f"{name}.{tag}": _small_images(name, tag) | ends for name, tags in bundled.items() for tag in tags}
    module.default_cfgs = generate_default_cfgs(cfgs)
    for name, arguments in sizes.items():
        setattr(module, name, register_model(_entrypoint(model_class, name, arguments, features)))


def _small_images(name: str, tag: str) -> dict[str, Any]:
    mean, std = _STATISTICS[tag.partition("_")[0]]
    changes = {"num_classes": 10, "input_size": (3, 32, 32), "crop_pct": 1.0, "mean": mean, "std": std}
    return _IMAGENET | changes | {"file": str(PRETRAINED / f"{name}.{tag}.safetensors")}


def _entrypoint(
    model_class: type[nn.Module], name: str, arguments: Mapping[str, Any], features: Callable[..., nn.Module] | None
) -> Callable[..., Any]:
    """Returns the function that timm calls to create the model.

    The model's attribute `model_args` holds the arguments it was asked for, so that a saved model can be made again.
    """

    def create(pretrained: bool = False, **changes: Any) -> Any:
        if changes.get("features_only") and features is None:
            raise ValueError(f"{name} has one resolution and no feature maps: features_only is for hierarchical models")
        feature_cfg = {"feature_cls": features, "out_indices": None}  # None: maps of all stages
        options = {**arguments, **changes}
        model: Any = build_model_with_cfg(model_class, name, pretrained, feature_cfg=feature_cfg, **options)
        model.model_args = {key: value for key, value in changes.items() if key not in NOT_ARCHITECTURE}
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = model_class.__module__
    return create
