"""Identifies the registered model that a file of weights is for, by the names and shapes of the tensors alone.

Every registered model is built on the meta device, which costs no memory, and compared with the file.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptq4vm.models.hierarchical import FeatureMaps
from ptq4vm.models.registry import ENTRIES, create_model, pretrained_cfg
from ptq4vm.terminal_text import listing

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

MIN_NAME_OVERLAP = 0.5
"""Share of the names in a file or a model that both must have to be of one family; all blocks count as one.
Other models of timm with similar names (Swin, DeiT) reach half of it."""


_ENDS = ("classifier.", "norm.", "head.")
"""Beginnings of the names of a classifier's tensors that its backbone does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """Names of tensors that a file lacks, has in addition, or has in another shape (the file's, the model's)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[Shape, Shape]]

    @classmethod
    def between(cls, file: Shapes, model: Shapes, **facts: Any) -> Self:
        """Compares a file with a model; `facts` are the other fields of a subclass."""
        return cls(
            missing=tuple(name for name in model if name not in file),
            unexpected=tuple(name for name in file if name not in model),
            misshapen={name: (file[name], model[name]) for name in model if file.get(name, model[name]) != model[name]},
            **facts,
        )

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    @property
    def only_ends(self) -> bool:
        """Whether a classifier's file meets a backbone: only the classifier and the norms of the maps differ."""
        norms = bool(self.missing) and all(name.startswith("outnorm") for name in self.missing)
        return norms and not self.misshapen and all(name.startswith(_ENDS) for name in self.unexpected)

    def lines(self) -> list[str]:
        """Returns one line of text for each kind of difference."""
        shapes = [f"{name} (file {file}, model {model})" for name, (file, model) in self.misshapen.items()]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": shapes}
        return [f"{kind}: {listing(names)}" for kind, names in kinds.items() if names]


@dataclass(frozen=True, slots=True, kw_only=True)
class Match(Differences):
    """Registered model, created with `arguments`, and the differences between a file and it."""

    name: str
    family: str
    features_only: bool
    arguments: Mapping[str, int]
    """Arguments of timm.create_model that the shapes tell."""
    agreement: float
    """Share of all tensors, the file's and the model's, that both have in the same shape."""

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name} with {options}" if options else self.name

    @property
    def options(self) -> dict[str, Any]:
        """All arguments of timm.create_model beside the name."""
        return {"features_only": True, **self.arguments} if self.features_only else dict(self.arguments)

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages with the meaning of the differences and the way out, as far as it is known."""
        meanings = {
            "num_classes": "head for {} classes",
            "in_chans": "images of {} channels",
            "img_size": "positions for images of {0}×{0} pixels",
        }
        notes = [
            f"{meanings[key].format(value)}: create it with {key}={value}" for key, value in self.arguments.items()
        ]
        if self.only_ends:
            norms = sorted({name.partition(".")[0] for name in self.missing})
            notes.append(f"weights of a classifier: load them with strict=False, {listing(norms)} stay as created")
        if varies := _varying(self, "pos_embed", axis=1):
            file, model = (_side(tokens) for tokens in varies)
            if _overlapping(file, model):
                notes.append(
                    f"positions of {file}×{file} patches that overlap by half (where {model}×{model} do not): "
                    "no registered model has such patches"
                )
        return tuple(notes)


def identify(weights: Mapping[str, Tensor]) -> tuple[Match, ...]:
    """Compares weights with the registered models.

    Several models fit where they differ in something that no tensor holds, such as the directions of their scans.

    Args:
        weights: tensors by name.

    Returns:
        All models of the family that the weights belong to, the best first; none for other families.

    Example:
        >>> import timm, ptq4vm.models
        >>> match, *others = identify(timm.create_model("vmamba_nano_32", num_classes=7).state_dict())
        >>> str(match), match.fits
        ('vmamba_nano_32 with num_classes=7', True)
    """
    blueprints = [blueprint for name in registered() for blueprint in _blueprints(name)]
    overlap, family = max((name_overlap(b.translated(weights), b.shapes), b.family) for b in blueprints)
    if overlap < MIN_NAME_OVERLAP:
        return ()
    matches = [_match(b, weights) for b in blueprints if b.family == family]
    return tuple(sorted(matches, key=lambda m: (-m.agreement, len(m.arguments), m.features_only, len(m.missing))))


def match(name: str, weights: Mapping[str, Tensor]) -> Match:
    """Compares weights with one registered classifier."""
    return _match(_blueprints(name)[0], weights)


def names_of(name: str) -> frozenset[str]:
    """Returns the names of the tensors of one registered classifier."""
    return frozenset(_blueprints(name)[0].shapes)


def registered() -> Mapping[str, str]:
    """Returns the families of this package's models by their names."""
    return {name: ENTRIES[name].family for name in sorted(ENTRIES)}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def translated(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns the weights of an older release under the names that the model has now."""
    translate = getattr(model, "checkpoint_filter", None)
    return weights if translate is None else translate(weights)


@dataclass(frozen=True, slots=True)
class _Blueprint:
    """Registered model on the meta device, without values."""

    name: str
    model: nn.Module
    shapes: Shapes

    @property
    def features_only(self) -> bool:
        return isinstance(self.model, FeatureMaps)

    @property
    def family(self) -> str:
        return ENTRIES[self.name.partition(".")[0]].family

    def translated(self, weights: Mapping[str, Tensor]) -> Shapes:
        return shapes_of(translated(self.model, weights))


@functools.cache
def _blueprints(name: str, **arguments: Any) -> tuple[_Blueprint, ...]:
    """Returns the classifier, and its backbone if it has one."""
    with torch.device("meta"):
        model: Any = create_model(name, **arguments)
        features = ENTRIES[name.partition(".")[0]].features
        models = (model,) if features is None else (model, features(model))
    return tuple(_Blueprint(name, each, shapes_of(each.state_dict())) for each in models)


def _match(blueprint: _Blueprint, weights: Mapping[str, Tensor]) -> Match:
    file, shapes = blueprint.translated(weights), blueprint.shapes
    arguments = _arguments(Differences.between(file, shapes), blueprint.name)
    if arguments:
        shapes = _blueprints(blueprint.name, **arguments)[blueprint.features_only].shapes
    agreeing = sum(file[name] == shapes[name] for name in file.keys() & shapes.keys())
    return Match.between(
        file,
        shapes,
        name=blueprint.name,
        family=blueprint.family,
        features_only=blueprint.features_only,
        arguments=arguments,
        agreement=agreeing / len(file.keys() | shapes.keys()),
    )


def _arguments(found: Differences, name: str) -> dict[str, int]:
    """Returns the arguments that explain differences: the number of classes or channels, the size of images."""
    cfg: Any = pretrained_cfg(name)
    arguments = {}
    if varies := _varying(found, f"{cfg.classifier}.weight", axis=0):
        arguments["num_classes"] = varies[0]
    if varies := _varying(found, f"{cfg.first_conv}.weight", axis=1):
        arguments["in_chans"] = varies[0]
    if varies := _varying(found, "pos_embed", axis=1):
        file, model = (_side(tokens) for tokens in varies)
        if file and model and file != model and not _overlapping(file, model):
            arguments["img_size"] = file * (cfg.input_size[-1] // model)
    return arguments


def _varying(found: Differences, name: str, axis: int) -> tuple[int, int] | None:
    """Returns the sizes in the file and in the model if the shapes of a tensor differ along this axis alone."""
    file, model = found.misshapen.get(name, ((), ()))
    if len(file) != len(model) or [i for i in range(len(file)) if file[i] != model[i]] != [axis]:
        return None
    return file[axis], model[axis]


def _side(tokens: int) -> int:
    """Returns the patches along a side of a square of tokens, with or without a class token; 0 if it is no square."""
    side = math.isqrt(tokens)
    return side if tokens - side**2 <= 1 else 0


def _overlapping(file: int, model: int) -> bool:
    """Whether the file's patches overlap by half: there are as many at half the stride.

    Vim was also released with such patches; their positions would fit a model for larger images.
    """
    return file == 2 * model - 1


def name_overlap(file: Iterable[str], model: Iterable[str]) -> float:
    """Returns the share of all names that both have; numbers of blocks do not matter."""
    mine, other = ({re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in names} for names in (file, model))
    return len(mine & other) / len(mine | other)
