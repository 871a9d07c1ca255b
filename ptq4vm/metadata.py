"""Metadata of a prepared or quantized graph: kept in `GraphModule.meta`, written to config.json."""

import dataclasses
import enum
import json
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig

_KEY = "ptq4vm"

COVERAGE = "ptq4vm.coverage"
"""Key in the `meta` of a graph that is being prepared of its `Coverage`."""

FUSIONS = "ptq4vm.fusions"
"""Key in a fused graph's `meta` of every `ptq4vm.passes.lower.patterns.Fusion`."""


class Stage(enum.StrEnum):
    """Stage of a graph; `convert` returns converted graphs, with integers or with Q/DQ nodes."""

    PREPARED = "prepared"
    CALIBRATED = "calibrated"
    CONVERTED = "converted"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMetadata:
    """Quantized linear: (B, tokens, in_features) → (B, tokens, out_features)."""

    name: str
    tokens: int
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductMetadata:
    """Product of a weight with what depends on the image: a linear in any writing, or a convolution."""

    name: str
    multiply_adds: int
    """For one image."""
    left: str | None = None
    """Why its weight stays in floating point; None where it is quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """All products of weights of a model, quantized or left."""

    products: tuple[ProductMetadata, ...] = ()
    """Linears in any writing, 1×1 convolutions among them."""
    convolutions: tuple[ProductMetadata, ...] = ()
    """Convolutions of neighbours, or of single channels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationMetadata:
    """Origin of a graph, and the decisions about its quantization."""

    config: QuantConfig
    linears: tuple[LinearMetadata, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    """Shapes of the inputs, without the batch."""
    architecture: dict[str, Any] | None
    """Name, arguments and preprocessing of the model in timm; None for a model that timm cannot build."""
    coverage: Coverage = Coverage()
    """Empty in models that were saved before there was one."""
    stage: Stage = Stage.PREPARED
    blocks: tuple[dict[str, Any], ...] = ()
    """One report of calibration per block: its linears, and the losses before and after learning."""


def metadata_of(gm: GraphModule) -> QuantizationMetadata:
    """Returns a graph's metadata; raises TypeError for a graph that `ptq4vm.prepare` did not make."""
    metadata = getattr(gm, "meta", {}).get(_KEY)
    if not isinstance(metadata, QuantizationMetadata):
        raise TypeError(f"expected a graph from ptq4vm.prepare or ptq4vm.convert, got {type(gm).__name__}")
    return metadata


def prepared_metadata(gm: GraphModule) -> QuantizationMetadata:
    """Returns a graph's metadata; raises TypeError also for a graph that is converted already."""
    metadata = metadata_of(gm)
    if metadata.stage is Stage.CONVERTED:
        raise TypeError("expected a graph from ptq4vm.prepare, got one that ptq4vm.convert has converted")
    return metadata


def set_metadata(gm: GraphModule, metadata: QuantizationMetadata) -> GraphModule:
    gm.meta[_KEY] = metadata
    return gm


def update_metadata(gm: GraphModule, **changes: Any) -> GraphModule:
    return set_metadata(gm, dataclasses.replace(metadata_of(gm), **changes))


_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def architecture_of(model: nn.Module, input_shapes: tuple[tuple[int, ...], ...]) -> dict[str, Any] | None:
    """Returns timm's name for the model, and the arguments in which it differs from that name's defaults."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    if not name or len(input_shapes) != 1 or len(input_shapes[0]) != 3:
        return None
    channels, height, width = input_shapes[0]
    arguments: dict[str, Any] = dict(getattr(model, "model_args", {}))  # ours have the arguments of `create_model`
    if "num_classes" in cfg:  # a backbone has none
        arguments["num_classes"] = getattr(model, "num_classes", cfg["num_classes"])
    default_channels, *default_size = cfg.get("input_size", (3, 224, 224))
    if channels != default_channels:
        arguments["in_chans"] = channels
    fixed_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if fixed_size is not None and [height, width] != default_size:
        arguments["img_size"] = [height, width]
    preprocessing = {key: cfg[key] for key in _PREPROCESSING if key in cfg} | {"input_size": input_shapes[0]}
    names = cfg.get("label_names") or ()
    if len(names) == arguments.get("num_classes"):  # another head tells other classes apart
        preprocessing["label_names"] = names
    # as JSON brings it back
    return json.loads(json.dumps({"name": name, "arguments": arguments, "preprocessing": preprocessing}))
