"""Saving and loading a quantized model: `model.safetensors` and `config.json`, nothing that is ever unpickled.

config.json follows timm's layout (architecture, num_classes, pretrained_cfg) with a `quantization_config` beside it.
Loading builds the floating-point model, captures it, gives it the same structure, and fills in the saved tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn
from torch.fx import GraphModule

import ptq4vm
from ptq4vm.config import QuantConfig
from ptq4vm.passes.fuse import fusions
from ptq4vm.passes.lower import is_lowered
from ptq4vm.pipeline import skeleton
from ptq4vm.record import LinearRecord, Record, Stage, record_of, set_record

FORMAT_VERSION = 1
METHOD = "ptq4vm"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class CheckpointError(ValueError):
    """A saved model that cannot be loaded."""


def save(quantized: GraphModule, folder: str | Path) -> Path:
    """Writes a lowered model; a folder that exists is replaced only once the new one is complete.

    Raises ValueError for a graph that is not lowered, and FileExistsError for a folder that holds something else.
    """
    record, folder = record_of(quantized), free_folder(folder)
    if fusions(quantized):
        raise ValueError("a fused model is laid out for this machine: save the one that ptq4vm.fuse was given")
    if not is_lowered(quantized):
        raise ValueError("only lowered models are saved: call ptq4vm.convert(prepared) without lower=False")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        tensors = {name: value.detach().contiguous() for name, value in quantized.state_dict().items()}
        # not save_file, which gives the file to its owner alone
        (temporary / WEIGHTS).write_bytes(serialize(tensors, metadata={"format": "pt"}))
        config = _describe(record) | {"weights_sha256": _digest(temporary / WEIGHTS)}
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def free_folder(folder: str | Path) -> Path:
    """The folder's real path, if a model may be saved there: new, empty, or a saved model to replace."""
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another folder")
    held = {file.name for file in path.iterdir()} if path.exists() else set()
    if held and not _is_ours(path / CONFIG):
        raise FileExistsError(f"{folder} exists and holds no quantized model; choose another folder")
    if others := sorted(held - {WEIGHTS, CONFIG}):
        raise FileExistsError(f"{folder} also holds {', '.join(others[:5])}, which saving would delete; move them away")
    return path


def _is_ours(config: Path) -> bool:
    try:
        return json.loads(config.read_text())["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _move(temporary: Path, folder: Path) -> None:
    previous = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, previous)
    try:
        os.replace(temporary, folder)
    except BaseException:
        if previous.exists():
            os.replace(previous, folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(record: Record) -> dict[str, Any]:
    architecture = record.architecture or {}
    arguments = architecture.get("arguments", {})
    return {
        "architecture": architecture.get("name"),
        "num_classes": arguments.get("num_classes"),
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": architecture.get("preprocessing", {}),
        "input_shapes": [list(shape) for shape in record.input_shapes],
        "quantization_config": {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "ptq4vm_version": ptq4vm.__version__,
            "torch_version": torch.__version__,
            **record.config.to_dict(),
            "linears": [dataclasses.asdict(linear) for linear in record.linears],
            "blocks": list(record.blocks),
        },
    }


_NOT_CONFIG = ("quant_method", "format_version", "ptq4vm_version", "torch_version", "linears", "blocks")


def load(folder: str | Path, *, model: nn.Module | None = None) -> GraphModule:
    """The saved model; its logits equal those of the saved one bit for bit on the same machine.

    `model` is the floating-point model, with any weights, where timm does not know its name. Raises CheckpointError
    with the folder's name and the way out for a file that is missing, truncated, edited, or of a newer version.
    """
    folder = Path(folder)
    config, record = read_record(folder)
    if _digest(folder / WEIGHTS) != config.get("weights_sha256"):
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that was saved (its SHA-256 differs from {CONFIG}'s): it was "
            "truncated or edited; copy the folder again or quantize the model again"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a safetensors file: {error}") from error
    model = _build(record, folder) if model is None else model
    examples = tuple(torch.zeros(2, *shape) for shape in record.input_shapes)
    quantized = skeleton(model, examples, record.config)
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    want = {name: tuple(value.shape) for name, value in quantized.state_dict().items()}
    if have != want:
        wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors do not fit {type(model).__name__}, first {', '.join(wrong[:5])}; "
            "the model's code or arguments differ from those it was saved with"
        )
    # copies, since matrix products round differently where the file's memory is not aligned
    quantized.load_state_dict({name: value.clone() for name, value in tensors.items()}, strict=True, assign=True)
    for parameter in quantized.parameters():
        parameter.requires_grad_(False)
    return set_record(quantized, record)


def read_record(folder: str | Path) -> tuple[dict[str, Any], Record]:
    """config.json, as it is and as the record of the model; raises CheckpointError."""
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is not a saved model: it has no {' and no '.join(missing)}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        details = config["quantization_config"]
        method, version = details["quant_method"], details["format_version"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} is corrupt or not a quantized model's ({type(error).__name__}: {error}); "
            "copy the folder again or quantize the model again"
        ) from error
    if method != METHOD:
        raise CheckpointError(f"{folder} was quantized by {method!r}, not by {METHOD!r}; load it with that package")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, written by ptq4vm {details.get('ptq4vm_version')}; this is "
            f"ptq4vm {ptq4vm.__version__}, which reads up to {FORMAT_VERSION}: upgrade ptq4vm"
        )
    try:
        record = Record(
            config=QuantConfig.from_dict({k: v for k, v in details.items() if k not in _NOT_CONFIG}),
            linears=tuple(LinearRecord(**linear) for linear in details["linears"]),
            input_shapes=tuple(tuple(shape) for shape in config["input_shapes"]),
            architecture=_architecture(config),
            stage=Stage.CONVERTED,
            blocks=tuple(details["blocks"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} is corrupt: {error}") from error
    return config, record


def _architecture(config: dict[str, Any]) -> dict[str, Any] | None:
    if config["architecture"] is None:
        return None
    classes = {} if config["num_classes"] is None else {"num_classes": config["num_classes"]}
    arguments = classes | config["model_args"]
    return {"name": config["architecture"], "arguments": arguments, "preprocessing": config["pretrained_cfg"]}


def _build(record: Record, folder: Path) -> nn.Module:
    import timm

    import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)

    if record.architecture is None:
        raise CheckpointError(f"{folder} was made from a model that timm cannot build: load(folder, model=your_model)")
    try:
        return timm.create_model(record.architecture["name"], **record.architecture["arguments"])
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: timm cannot build the model ({error}); load(folder, model=your_model)"
        ) from error
