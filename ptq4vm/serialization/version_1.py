"""Loads folders of format version 1, which have tensors without a graph.

The floating-point model is built by the name in config.json, captured, given the same structure, and filled with the
saved tensors. A config.json may come from a stranger: only models in timm's registry are built, with simple arguments,
and none that is larger than its tensors say.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.metadata import QuantizationMetadata, set_metadata
from ptq4vm.serialization.model_file import METHOD, CheckpointError, check_qparams, read_metadata

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_ARGUMENT = 2**15
"""Largest number among the arguments of a model that is built from a file."""


class OtherVersionError(CheckpointError):
    """Raised for a config.json of another version than the file beside it."""


def load(folder: Path, data: bytes, model: nn.Module | None) -> GraphModule:
    """Returns the model whose `model.safetensors` holds `data`; raises CheckpointError."""
    from ptq4vm.serialization.empty_model import empty_quantized_model  # imports passes, which only version 1 needs

    config, metadata = read_config(folder)
    if hashlib.sha256(data).hexdigest() != config.get("weights_sha256"):
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that was saved (its SHA-256 differs from {CONFIG}'s): it was "
            "truncated or edited; copy the folder again or quantize the model again"
        )
    try:
        tensors = deserialize(data)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a safetensors file: {error}") from error
    if model is None:
        try:
            model = build_model(metadata.architecture, folder, sum(value.numel() for value in tensors.values()))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; load(folder, model=your_model)") from error
    examples = tuple(torch.zeros(2, *shape) for shape in metadata.input_shapes)
    try:
        linears = [linear.name for linear in metadata.linears]
        quantized = empty_quantized_model(model, examples, metadata.config, linears)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG} does not fit {type(model).__name__}: {error}") from error
    _fill(quantized, tensors, folder, type(model).__name__)
    return set_metadata(quantized, metadata)


def _fill(quantized: GraphModule, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    have = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    want = {name: (tuple(value.shape), value.dtype) for name, value in quantized.state_dict().items()}
    if have != want:
        wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors do not fit {name}, first {', '.join(wrong[:5])}; "
            "the model's code or arguments differ from those it was saved with"
        )
    # copies, since matrix products round differently where the file's memory is not aligned
    quantized.load_state_dict({name: value.clone() for name, value in tensors.items()}, strict=True, assign=True)
    for parameter in quantized.parameters():
        parameter.requires_grad_(False)
    try:
        check_qparams(quantized)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from error


def read_config(folder: Path) -> tuple[dict[str, Any], QuantizationMetadata]:
    """Returns the content of config.json, and the model's metadata in it; raises CheckpointError."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a saved model: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text())
        details = config["quantization_config"]
        method, version = details["quant_method"], details["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is corrupt or not a quantized model's ({type(error).__name__}: {error}); "
            "copy the folder again or quantize the model again"
        ) from error
    if method != METHOD:
        raise CheckpointError(f"{folder} was quantized by {method!r}, not by {METHOD!r}; load it with that package")
    if version != FORMAT_VERSION:
        raise OtherVersionError(
            f"{path} has format version {version}, but {WEIGHTS} beside it holds no graph as versions from 2 on do: "
            "copy the folder again or quantize the model again"
        )
    try:
        return config, read_metadata(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error


def build_model(architecture: dict[str, Any] | None, folder: str | Path, elements: int | None = None) -> nn.Module:
    """Builds the floating-point model that a file names, with random weights.

    Raises CheckpointError for a name that timm's registry does not have, for arguments that reach files or the
    network, and for a model of far more parameters than the file has `elements`.
    """
    from ptq4vm.models import create_model
    from ptq4vm.models.registry import is_model

    if architecture is None:
        raise CheckpointError(f"{folder} was made from a model that timm cannot build")
    name, arguments = architecture["name"], architecture["arguments"]
    if not (isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII) and is_model(name)):
        raise CheckpointError(f"{folder}: timm cannot build the model ({name!r:.80} is not in its registry)")
    for key, value in arguments.items():
        if key.startswith(("pretrained", "checkpoint")) or key in ("cache_dir", "scriptable") or not _is_simple(value):
            raise CheckpointError(f"{folder}: the argument {key}={value!r:.80} of {name} is refused")
    try:
        with torch.device("meta"):
            size = sum(value.numel() for value in create_model(name, **arguments).state_dict().values())
        if elements is not None and size > 4 * elements + 2**20:
            raise CheckpointError(f"{folder}: {name} would have {size} parameters, the file {elements}: it is refused")
        return create_model(name, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, KeyError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: timm cannot build the model ({error})") from error


def _is_simple(value: Any) -> bool:
    """Whether an argument is a number of moderate size, a word, or a short list of these."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 64 and all(_is_simple(item) for item in value)
    if isinstance(value, str):
        return re.fullmatch(r"\w{0,64}", value, re.ASCII) is not None
    return value is None or (
        isinstance(value, (bool, int, float)) and math.isfinite(value) and abs(value) <= MAX_ARGUMENT
    )
