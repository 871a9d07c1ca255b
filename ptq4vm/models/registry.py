"""Registers the models of this package, in a table of its own and with timm.

Authors' repositories register some of the same names with timm (`local_vim_tiny` of hunto/LocalMamba). Such a name is
left to them: `timm.create_model` then makes their model, whichever package is imported first. What this package looks
up by a name, for its command line, checkpoints and saved models, comes from its own table.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
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
_CLASSES = {
    "digits": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Model of this package: the class, its arguments, and the preprocessing for every tag of weights."""

    name: str
    model_class: type[nn.Module]
    arguments: Mapping[str, Any]
    features: Callable[..., nn.Module] | None
    cfgs: DefaultCfg

    @property
    def family(self) -> str:
        return self.model_class.__module__.rpartition(".")[2]

    def cfg(self, tag: str | None = None) -> PretrainedCfg:
        """Returns the preprocessing and the file of weights, the default ones without a tag."""
        tag = tag or self.cfgs.tags[0]
        if tag not in self.cfgs.cfgs:
            known = ", ".join(filter(None, self.cfgs.tags)) or "none"
            raise RuntimeError(f"Invalid pretrained tag ({tag}) for {self.name}; its tags: {known}")
        return dataclasses.replace(self.cfgs.cfgs[tag], architecture=self.name, tag=tag or None)

    def create(self, pretrained: bool = False, **changes: Any) -> Any:
        """Makes the model as timm does, with this package's preprocessing for its name.

        The model's attribute `model_args` holds the arguments it was asked for, for a saved model to be made again.
        """
        if changes.get("features_only") and self.features is None:
            raise ValueError(
                f"{self.name} has one resolution and no feature maps: features_only is for hierarchical models"
            )
        cfg = changes.get("pretrained_cfg")
        options = {**self.arguments, **changes}
        options["pretrained_cfg"] = self.cfg(cfg) if cfg is None or isinstance(cfg, str) else cfg
        feature_cfg = {"feature_cls": self.features, "out_indices": None}  # None: maps of all stages
        model: Any = build_model_with_cfg(self.model_class, self.name, pretrained, feature_cfg=feature_cfg, **options)
        model.model_args = {key: value for key, value in changes.items() if key not in NOT_ARCHITECTURE}
        return model


ENTRIES: dict[str, Entry] = {}
"""All models of this package by name."""


def register(
    model_class: type[nn.Module],
    sizes: Mapping[str, Mapping[str, Any]],
    bundled: Mapping[str, Sequence[str]],
    features: Callable[..., nn.Module] | None = None,
    preprocessing: Mapping[str, Mapping[str, Any]] | None = None,
    **ends: str,
) -> None:
    """Adds the models of a family to the table and to timm's registry.

    Args:
        model_class: class of the models.
        sizes: arguments of the class by the name of the model.
        bundled: tags of the bundled weights by model; these models take 32×32 images of 10 classes, the others
            ImageNet's, 224×224.
        features: makes a backbone of a model, for `features_only=True`.
        preprocessing: what differs from ImageNet's usual preprocessing, by the name of the model.
        ends: names of the parts at both ends of the model, `first_conv` and `classifier`.
    """
    module: Any = sys.modules[model_class.__module__]
    changes = preprocessing or {}
    cfgs: Any = {name: {**_IMAGENET, **ends, **changes.get(name, {})} for name in sizes if name not in bundled}
    cfgs |= {f"{name}.{tag}": _small_images(name, tag) | ends for name, tags in bundled.items() for tag in tags}
    module.default_cfgs = generate_default_cfgs(cfgs)
    for name, arguments in sizes.items():
        ENTRIES[name] = Entry(name, model_class, arguments, features, module.default_cfgs[name])
        setattr(module, name, _entrypoint(ENTRIES[name]))
        if not timm.is_model(name):
            register_model(getattr(module, name))


def _small_images(name: str, tag: str) -> dict[str, Any]:
    dataset = tag.partition("_")[0]
    mean, std = _STATISTICS[dataset]
    changes = {"num_classes": 10, "input_size": (3, 32, 32), "crop_pct": 1.0, "mean": mean, "std": std}
    file = str(PRETRAINED / f"{name}.{tag}.safetensors")
    return _IMAGENET | changes | {"label_names": _CLASSES[dataset], "file": file}


def _entrypoint(entry: Entry) -> Callable[..., Any]:
    """Returns the function that timm calls to create the model, which it knows by the function's name and module."""

    def create(pretrained: bool = False, **changes: Any) -> Any:
        return entry.create(pretrained, **changes)

    create.__name__ = create.__qualname__ = entry.name
    create.__module__ = entry.model_class.__module__
    return create


def is_model(name: str) -> bool:
    """Whether this package or timm has a model of this name, a tag left aside."""
    return name.partition(".")[0] in ENTRIES or timm.is_model(name)


def pretrained_cfg(name: str) -> PretrainedCfg | None:
    """Returns the preprocessing and the file of weights of a model of this package, or else of timm's.

    Raises RuntimeError for a tag that the model does not have.
    """
    name, _, tag = name.partition(".")
    return ENTRIES[name].cfg(tag) if name in ENTRIES else timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name)


def create_model(name: str, pretrained: bool = False, **options: Any) -> Any:
    """Creates a model of this package, or one of timm if this package has none of that name.

    `timm.create_model` does the same, except where another package has registered the name with timm too: then it
    creates that package's model.

    Args:
        name: as in timm's registry, with or without a tag.
        pretrained: fill it with the weights of the tag.
        options: arguments of the model, and of `timm.create_model`.

    Returns:
        The model.

    Raises:
        RuntimeError: neither knows the name, or it has no such tag.

    Example:
        >>> create_model("vim_nano_patch4_32.digits", pretrained=True, num_classes=10).pretrained_cfg["architecture"]
        'vim_nano_patch4_32'
    """
    own, _, tag = name.partition(".")
    if own not in ENTRIES:
        return timm.create_model(name, pretrained=pretrained, **options)
    options = {key: value for key, value in options.items() if value is not None}
    return ENTRIES[own].create(pretrained, **{"pretrained_cfg": tag or None} | options)
