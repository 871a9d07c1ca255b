"""Weights out of the checkpoint files that the authors of the models publish, without trusting the files.

Training scripts pickle more than weights: arguments, a config, meters. Those must not stop the reading, and
must not run: `torch.load(weights_only=True)` calls only what is allowed, and what is allowed here beyond
tensors is a namespace, a dict, and stand-ins that hold nothing.
"""

import argparse
import logging
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptq4vm.models.hierarchical import FeatureMaps
from ptq4vm.models.identify import Differences, identify, listing, shapes_of, translated
from ptq4vm.text import escaped

logger = logging.getLogger(__name__)

CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "params", "network", "net", "weights", "model_state")
EMA_CONTAINERS = ("model_ema", "ema_model", "state_dict_ema", "ema", "params_ema", "ema_state_dict", "averaged_model")
AXES = 64
"""Torch indexes no tensors of more."""
DEPTH = 4
"""Containers within containers, at most."""
WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Parts of a name that torch.compile and others put anywhere in it."""
OUTER = frozenset(("module", "model", "net", "network", "backbone"))
"""First parts of names under which training scripts and detectors keep the model beside other things."""
COUNTERS = frozenset(("n_averaged",))
"""What torch.optim.swa_utils.AveragedModel has beside the weights."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
    """`state_dict`, or `ema.module` where one is in the other; None where the file itself is the weights by name."""
    averaged: tuple[str, ...]
    """Containers of averaged weights in the file; `ema` reads the first."""
    prefix: str
    """What all names of the weights begin with in the file and not in the model, such as `model.`."""
    left_out: tuple[str, ...]
    """Names without that prefix, such as those beside the backbone in a detector."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the names, for people."""
        prefix = [f"names begin with {self.prefix!r} in the file, which is taken off"] if self.prefix else []
        rest = [f"{len(self.left_out)} tensors beside them are left out: {listing(self.left_out)}"]
        return (*prefix, *(rest if self.left_out else ()))


def read_checkpoint(path: str | os.PathLike[str], *, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a file by their names in the model, on the CPU; with `ema` the averaged ones."""
    return open_checkpoint(path, ema=ema).weights


def open_checkpoint(
    path: str | os.PathLike[str], *, ema: bool = False, names: Collection[str] | None = None
) -> Checkpoint:
    """The same weights, and where in the file they are.

    Args:
        path: a file of torch.save, of either format, or of safetensors.
        ema: take averaged weights.
        names: those of the model that is to be filled, which tell what is a prefix. Without them a prefix is what all
            names share, or one of the usual ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: in one line that begins with the path, for whatever is no file of dense weights by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    container, averaged, weights = _select(content, path, ema)
    strangers = [name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strangers:
        raise ValueError(f"{path}: these entries among the weights are not tensors: {listing(strangers)}")
    _check_dense(path, weights)
    prefix, kept = _without_prefix(weights, names, path, ema)
    return Checkpoint(
        weights={new: weights[old].detach() for old, new in kept.items()},
        container=container,
        averaged=averaged,
        prefix=prefix,
        left_out=tuple(name for name in weights if name not in kept and name not in COUNTERS),
    )


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, ema: bool = False, strict: bool = True
) -> Checkpoint:
    """Fill the model from a file, or raise and leave the model as it was.

    Args:
        model: its tensors keep their dtypes and devices; weights are rounded to them.
        ema: take averaged weights.
        strict: without it, names that only one side has are logged; shapes must agree in any case.

    Returns:
        What was found in the file; `notes` says what was done to the names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no weights, or not those of the model, or some are complex, integer, boolean, sparse,
            quantized or not finite; the message begins with the path and names them.
    """
    own = model.state_dict()
    file = open_checkpoint(path, ema=ema, names=own.keys())
    state = translated(model, file.weights)
    found = Differences.between(shapes_of(state), shapes_of(own))
    strangers = bool(own) and len(found.missing) == len(own)
    differences = "".join(f"\n  {line}" for line in (*found.lines(), *file.notes))
    if found.misshapen or strangers or (strict and not found.fits):
        raise ValueError(
            f"{path} does not fit {type(model).__name__}{_way_out(model, found, file.weights)}{differences}"
        )
    ready = {name: _converted(path, name, value, own.get(name)) for name, value in state.items()}
    if not found.fits:
        logger.warning("%s: loaded what fits%s", path, "".join(f"\n  {line}" for line in found.lines()))
    for note in file.notes:
        logger.info("%s: %s", path, note)
    _fill(model, own, ready, strict, path)
    return file


def bad_values(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights that no model can be filled with, as they hold NaN or infinity."""
    return [name for name, value in weights.items() if value.is_floating_point() and not _is_finite(value)]


def _is_finite(value: Tensor) -> bool:
    # axes that were expanded have one value; float8 knows no isfinite
    distinct = value[tuple(slice(0, 1 if step == 0 else None) for step in value.stride())] if value.ndim else value
    return bool(distinct.float().isfinite().all()) if distinct.dtype not in FLOATS else bool(distinct.isfinite().all())


def _converted(path: str | os.PathLike[str], name: str, value: Tensor, own: Tensor | None) -> Tensor:
    """A weight as the model holds it, if that is the same number."""
    if own is None:
        return value
    floating = own.is_floating_point()
    if value.dtype not in (FLOATS if floating else FLOATS + INTEGERS) and value.dtype != own.dtype:
        raise ValueError(f"{path}: {escaped(name)} is of dtype {_dtype(value)}, where the model has {_dtype(own)}")
    if own.is_meta:
        raise ValueError("the model is on the meta device, which holds no values: call model.to_empty(device='cpu')")
    made = value.to(device=own.device, dtype=own.dtype)
    if floating and not _is_finite(made):
        raise ValueError(f"{path}: {escaped(name)} holds NaN or infinity, or what is infinite in {_dtype(own)}")
    if not floating and not torch.equal(made.to(value.dtype), value.to(own.device)):
        raise ValueError(f"{path}: {escaped(name)} holds what is no {_dtype(own)}, as the model has")
    return made


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _fill(
    model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], strict: bool, path: str | os.PathLike[str]
) -> None:
    """All or nothing, whatever a module does when its state is loaded."""
    before = {name: value.detach().clone() for name, value in own.items()}
    try:
        model.load_state_dict(state, strict=strict)
    except BaseException as error:
        with torch.no_grad():
            for name, value in own.items():
                if not torch.equal(value, before[name]):
                    value.copy_(before[name])
        if isinstance(error, RuntimeError):
            raise ValueError(f"{path} cannot be loaded into {type(model).__name__}: {error}") from error
        raise


def _check_dense(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuses what is no plain array of numbers, whose other properties may raise or lie."""
    for name, value in weights.items():
        if odd := _oddity(value):
            raise ValueError(f"{path}: {escaped(name)} is {odd}; save it as a plain tensor of floating-point numbers")


def _oddity(value: Tensor) -> str | None:
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a sparse tensor ({str(value.layout).removeprefix('torch.')})"
    if value.is_quantized:
        return f"a quantized tensor ({_dtype(value)})"
    if value.device.type != "cpu":
        return f"a tensor on the device {value.device.type}, without values"
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"a {type(value).__name__}"
    if value.is_complex() or value.dtype not in (*FLOATS, *INTEGERS, torch.bool, *_float8()):
        return f"of dtype {_dtype(value)}"
    if value.ndim > AXES:
        return f"of {value.ndim} axes"
    spread = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    held = math.prod(size for size, step in zip(value.shape, value.stride(), strict=True) if step)
    return "a tensor whose values overlap in memory" if held > max(spread, 0) + 1 else None


def _float8() -> tuple[torch.dtype, ...]:
    return tuple(value for name, value in vars(torch).items() if name.startswith("float8_"))


def _way_out(model: nn.Module, found: Differences, weights: Mapping[str, Tensor]) -> str:
    """Which model the file is for, or what to check where that is not known."""
    matches = identify(weights)
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


def _is_safetensors(path: Path) -> bool:
    """By its name, or by its content: the length of a JSON object, and the object."""
    if path.suffix.lower() == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and head[:2] != b"PK" and head[:1] != b"\x80"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # beside its own errors, KeyError for a dtype that torch lacks
        raise ValueError(f"{path}: truncated, or not a safetensors file ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Its first sentence; torch.load goes on to recommend that the file be trusted."""
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"WeightsUnpickler error: *(.+)", str(error))
        return escaped(found[1])[:200] if found else "no pickle of weights"
    lines = str(error).splitlines() or [type(error).__name__]
    return escaped(lines[0].split(". ")[0])[:200]


def _check_archive(path: Path) -> None:
    """Refuses an archive that claims more than it has: torch would ask for that much memory."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # the reader of torch decides
        logger.debug("%s: %s", path, error)
        return
    if claimed > path.stat().st_size:
        raise ValueError(
            f"{path}: truncated, or not a checkpoint of torch.save (its entries claim {claimed} bytes, which the file "
            "does not have; torch.save does not compress)"
        )


def _read_pickle(path: Path) -> object:
    _check_archive(path)
    # The context takes its names away again at its end: leave out what the process allows already.
    ours = [entry for entry in _ALLOWED if entry not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(ours), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own classes, and of sparse tensors, which are refused
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
            raise ValueError(f"{path}: truncated, or not a checkpoint of torch.save ({_reason(error)})") from error


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
        raise ValueError(f"{path}: holds {type(content).__name__}, not weights by name")
    held = {name: content[name] for name in CONTAINERS + EMA_CONTAINERS if isinstance(content.get(name), Mapping)}
    averaged = tuple(name for name in held if name in EMA_CONTAINERS)
    if ema and not averaged:
        raise ValueError(
            f"{path}: no averaged weights under {', '.join(EMA_CONTAINERS)}; read it without ema "
            "(releases often hold the averaged weights as the model)"
        )
    chosen = averaged if ema else held
    for name in chosen:
        if (inner := _innermost(held[name])) is not None:
            return ".".join((name, *inner[0])), averaged, inner[1]
    if not ema and any(isinstance(value, Tensor) for value in content.values()):
        return None, (), content
    others = {name: value for name, value in content.items() if isinstance(value, Mapping) and _innermost(value, 0)}
    if not held and len(others) == 1:
        return str(next(iter(others))), averaged, next(iter(others.values()))
    if held:  # empty, or of other things, which are named then
        name = next(iter(chosen))
        return name, averaged, held[name]
    raise ValueError(
        f"{path}: no weights under {', '.join(CONTAINERS + EMA_CONTAINERS)}; it holds {listing(content) or 'nothing'}"
    )


def _innermost(content: Mapping[str, Any], depth: int = DEPTH) -> tuple[tuple[str, ...], Mapping[str, Any]] | None:
    """The first mapping with tensors, and the containers on the way to it."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return (), content
    for name in CONTAINERS + EMA_CONTAINERS if depth else ():
        if isinstance(content.get(name), Mapping) and (inner := _innermost(content[name], depth - 1)) is not None:
            return (name, *inner[0]), inner[1]
    return None


def _without_prefix(
    weights: Mapping[str, Any], wanted: Collection[str] | None, path: Path, ema: bool
) -> tuple[str, dict[str, str]]:
    """The prefix, and the names without it and without what wrapped the model, by those in the file."""
    plain = {name: _unwrapped(name) for name in weights if name not in COUNTERS}
    prefix = _common_prefix(list(plain.values()))
    if wanted is not None:
        fitting = _fitting_prefixes(plain.values(), frozenset(wanted))
        if len(fitting) > 1:  # some scripts keep averaged weights beside the others
            fitting = [each for each in fitting if ("ema" in each) == ema] or fitting
        if len(fitting) > 1:
            shown = listing(repr(each) for each in fitting)
            raise ValueError(f"{path}: these weights are there twice, under the prefixes {shown}")
        prefix = fitting[0] if fitting else prefix
    names = {old: new.removeprefix(prefix) for old, new in plain.items() if new.startswith(prefix)}
    counts = Counter(names.values())
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"{path}: these weights are there twice, with and without a prefix: {listing(twice)}")
    return prefix, names


def _unwrapped(name: str) -> str:
    """Without what wrapped the model, or a part of it: nn.DataParallel at the front, torch.compile anywhere."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def _common_prefix(names: list[str]) -> str:
    """The first parts that all names share; else, one after the other, those of `OUTER` that some have."""
    prefix = ""
    while True:
        rest = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        first = {name.partition(".")[0] for name in rest if "." in name}
        listed = all(name.split(".")[1:2] and name.split(".")[1].isdigit() for name in rest)  # layers.0, layers.1
        shared = first if len(first) == 1 and all("." in name for name in rest) and not listed else first & OUTER
        if len(shared) != 1:
            return prefix
        prefix += f"{next(iter(shared))}."


def _fitting_prefixes(names: Iterable[str], wanted: frozenset[str]) -> list[str]:
    """The prefixes without which most of the model's names are there; several where weights are there twice.

    None where less than half of the model's names are: it is another model's file.
    """
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join((*parts[:end], "")) for end in range(len(parts)) if ".".join(parts[end:]) in wanted)
    most = max(counts.values(), default=0)
    return sorted(prefix for prefix, count in counts.items() if count == most and 2 * most > len(wanted))
