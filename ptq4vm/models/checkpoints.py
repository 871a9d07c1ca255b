"""Weights out of the checkpoint files that the authors of the models publish, without trusting the files.

Training scripts pickle more than weights: arguments, a config, meters. Those must not stop the reading, and
must not run: `torch.load(weights_only=True)` calls only what is allowed, and what is allowed here beyond
tensors is a namespace, a dict, and stand-ins that hold nothing.
"""

import argparse
import logging
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptq4vm.models.hierarchical import FeatureMaps
from ptq4vm.models.recognize import Differences, listing, recognize, shapes_of, translated

logger = logging.getLogger(__name__)

CONTAINERS = ("model", "state_dict")
EMA_CONTAINERS = ("model_ema", "ema_model", "state_dict_ema")
WRAPPERS = ("module.", "_orig_mod.")  # nn.DataParallel, torch.compile
BACKBONE = "backbone."  # of a detector or a segmenter


class _Inert:
    """Takes the place of a class or function in a pickle: accepts its arguments and state, and drops both."""

    def __new__(cls, *args: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_INERT = (
    # a NumPy scalar or array: the best accuracy, the log of a loss
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    # mmengine's message hub, whose history buffers name their own methods through getattr
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    # an output folder among the arguments
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.WindowsPath",
)
_ALLOWED: tuple[Any, ...] = (
    argparse.Namespace,
    # torch sets the items of a plain or an ordered dict only, so a config is read as one
    (OrderedDict, "yacs.config.CfgNode"),
    *((_Inert, name) for name in _INERT),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weights in a file by their names in the model, on the CPU, and where they were found."""

    weights: dict[str, Tensor]
    container: str | None
    """None where the file itself is the weights by name."""
    averaged: tuple[str, ...]
    """Containers of averaged weights in the file; `ema` reads the first."""
    left_out: tuple[str, ...]
    """Names beside those of the backbone, in a detector."""


def read_checkpoint(path: str | os.PathLike[str], *, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a file by their names in the model, on the CPU; with `ema` the averaged ones."""
    return open_checkpoint(path, ema=ema).weights


def open_checkpoint(path: str | os.PathLike[str], *, ema: bool = False) -> Checkpoint:
    """The same weights, and where in the file they are."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    container, averaged, weights = _select(content, path, ema)
    strangers = [name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strangers:
        raise ValueError(f"{path}: these entries among the weights are not tensors: {listing(strangers)}")
    names = _bare(weights, path)
    return Checkpoint(
        weights={new: weights[old] for old, new in names.items()},
        container=container,
        averaged=averaged,
        left_out=tuple(name for name in weights if name not in names),
    )


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, ema: bool = False, strict: bool = True) -> None:
    """Fill the model from a file, or raise and leave the model as it was.

    Without `strict`, names that only one side has are logged; shapes must agree in any case.
    """
    weights = read_checkpoint(path, ema=ema)
    state, own = translated(model, weights), model.state_dict()
    found = Differences.between(shapes_of(state), shapes_of(own))
    strangers = bool(own) and len(found.missing) == len(own)
    differences = "".join(f"\n  {line}" for line in found.lines())
    if found.misshapen or strangers or (strict and not found.fits):
        raise ValueError(f"{path} does not fit {type(model).__name__}{_way_out(model, found, weights)}{differences}")
    if differences:
        logger.warning("%s: loaded what fits%s", path, differences)
    model.load_state_dict(state, strict=strict)


def _way_out(model: nn.Module, found: Differences, weights: Mapping[str, Tensor]) -> str:
    """Which model the file is for, or what to check where that is not known."""
    matches = recognize(weights)
    fitting = [str(match) for match in matches if match.fits]
    if isinstance(model, FeatureMaps) and found.only_ends:
        return (
            f": it is a classifier's{f' ({fitting[0]})' if fitting else ''}; strict=False loads it without its "
            "classifier, and leaves the norms of the maps as they are"
        )
    if fitting:
        return f": it fits {' or '.join(fitting)}"
    closest = f" Of all models {matches[0]} is the closest to the file." if matches else ""
    notes = "".join(f"\n  {note}" for note in matches[0].notes) if matches else ""
    return f"; was the model made with the same name, number of classes and image size?{closest}{notes}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from error


def _read_pickle(path: Path) -> object:
    # The context takes its names away again at its end: leave out what the process allows already.
    ours = [entry for entry in _ALLOWED if entry not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(ours):
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        # A damaged file makes the reader fail in its middle, with whatever that step raises.
        except Exception as error:
            if refused := _refused(path, error):
                raise ValueError(
                    f"{path}: reading it would have to call {listing(refused)}, which could run any code; "
                    "in an environment you trust, re-save the weights alone, with "
                    "torch.save(ckpt['model'], ...) or as safetensors"
                ) from error
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path}: truncated, or not a checkpoint of torch.save ({reason})") from error


def _refused(path: Path, error: Exception) -> list[str]:
    """The classes and functions in the file that are not allowed."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip archive, as files older than torch 1.6: the message names the first one
        return re.findall(r"\bGLOBAL (\S+) w", str(error))


def _select(content: object, path: Path, ema: bool) -> tuple[str | None, tuple[str, ...], Mapping[str, Any]]:
    """The container of the weights, those of averaged ones, and the mapping that holds the weights."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not weights by name")
    held = [name for name in CONTAINERS + EMA_CONTAINERS if isinstance(content.get(name), Mapping)]
    averaged = tuple(name for name in held if name in EMA_CONTAINERS)
    if ema and not averaged:
        raise ValueError(
            f"{path}: no averaged weights under {', '.join(EMA_CONTAINERS)}; read it without ema "
            "(releases often hold the averaged weights as the model)"
        )
    if held:
        container = averaged[0] if ema else held[0]
        return container, averaged, content[container]
    if any(isinstance(value, Tensor) for value in content.values()):
        return None, (), content
    raise ValueError(
        f"{path}: no weights under {', '.join(CONTAINERS + EMA_CONTAINERS)}; it holds {listing(content) or 'nothing'}"
    )


def _bare(weights: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Names without what wrapped the model, by those in the file; of a detector the backbone's alone."""
    names = {name: _unwrapped(name) for name in weights}
    if any(name.startswith(BACKBONE) for name in names.values()):
        names = {old: new.removeprefix(BACKBONE) for old, new in names.items() if new.startswith(BACKBONE)}
    if len(set(names.values())) != len(names):
        twice = sorted({new for new in names.values() if list(names.values()).count(new) > 1})
        raise ValueError(f"{path}: these weights are there twice, with and without a prefix: {listing(twice)}")
    return names


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
