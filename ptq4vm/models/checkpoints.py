"""Fills models with the weights of the checkpoint files that the authors of the models publish."""

import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq4vm.models.hierarchical import FeatureMaps
from ptq4vm.models.identify import Differences, identify, shapes_of, translated
from ptq4vm.models.weight_files import read_weight_file
from ptq4vm.models.weight_names import COUNTERS, find_weights, without_prefix
from ptq4vm.terminal_text import escaped, listing

logger = logging.getLogger(__name__)

AXES = 64
"""Largest number of axes that torch can index."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = tuple(value for name, value in vars(torch).items() if name.startswith("float8_"))
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights of a file by their names in the model, on the CPU, and where in the file they were."""

    weights: dict[str, Tensor]
    container: str | None
    """Key of the weights in the file: `state_dict`, or `ema.module` for nested ones; None if the file has no keys."""
    averaged: tuple[str, ...]
    """Containers of averaged weights in the file; `ema` reads the first."""
    prefix: str
    """Beginning of all names in the file that the model does not have, such as `model.`."""
    left_out: tuple[str, ...]
    """Names without that prefix, such as those beside the backbone in a detector."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages that say how the names were changed."""
        prefix = [f"names begin with {self.prefix!r} in the file, which is taken off"] if self.prefix else []
        rest = [f"{len(self.left_out)} tensors beside them are left out: {listing(self.left_out)}"]
        return (*prefix, *(rest if self.left_out else ()))


def open_checkpoint(
    path: str | os.PathLike[str], *, ema: bool = False, names: Collection[str] | None = None
) -> Checkpoint:
    """Finds the weights in a file.

    Args:
        path: a file of torch.save, of either format, or of safetensors.
        ema: take averaged weights.
        names: names of the model's tensors, which tell the prefix. Without them the prefix is what all names share, or
            a usual one.

    Returns:
        The weights under their names in the model, and where they were.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no dense weights by name; one line that begins with the path.

    Example:
        >>> from ptq4vm.models.registry import PRETRAINED
        >>> file = open_checkpoint(PRETRAINED / "vim_nano_patch4_32.digits.safetensors")
        >>> file.weights["head.weight"].shape, file.container, file.prefix
        (torch.Size([10, 64]), None, '')
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    container, averaged, weights = find_weights(read_weight_file(path), path, ema)
    strangers = [name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strangers:
        raise ValueError(f"{path}: these entries among the weights are not tensors: {listing(strangers)}")
    for name, value in weights.items():
        if odd := _oddity(value):
            raise ValueError(f"{path}: {escaped(name)} is {odd}; save it as a dense tensor of floating-point numbers")
    prefix, kept = without_prefix(weights, names, path, ema)
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
    """Fills a model with the weights of a file, or raises and leaves the model as it was.

    Args:
        model: any module; its tensors keep their dtypes and devices, to which the weights are rounded.
        path: a file of torch.save, of either format, or of safetensors.
        ema: take averaged weights.
        strict: refuse names that only one side has. False logs them; shapes must agree in any case.

    Returns:
        The weights, and where in the file they were; `notes` says how their names were changed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no weights, or weights of another model, or some that are complex, integer, boolean,
            sparse, quantized or not finite. The message begins with the path and names them.

    Example:
        >>> import timm, ptq4vm.models
        >>> from ptq4vm.models.registry import PRETRAINED
        >>> model = timm.create_model("vim_nano_patch4_32")
        >>> file = load_checkpoint(model, PRETRAINED / "vim_nano_patch4_32.digits.safetensors")
        >>> bool((model.head.weight == file.weights["head.weight"]).all())
        True
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
    """Returns the names of the weights that hold NaN or infinity, with which no model is filled."""
    return [name for name, value in weights.items() if value.is_floating_point() and not _is_finite(value)]


def _is_finite(value: Tensor) -> bool:
    # an expanded axis repeats one value; float8 has no isfinite
    distinct = value[tuple(slice(0, None if stride else 1) for stride in value.stride())] if value.ndim else value
    return bool(distinct.float().isfinite().all()) if distinct.dtype not in FLOATS else bool(distinct.isfinite().all())


def _converted(path: str | os.PathLike[str], name: str, value: Tensor, own: Tensor | None) -> Tensor:
    """Returns a weight in the dtype and on the device of the model's; raises ValueError if its values change."""
    if own is None:
        return value
    floating = own.is_floating_point()
    if value.dtype not in (FLOATS if floating else FLOATS + INTEGERS) and value.dtype != own.dtype:
        raise ValueError(f"{path}: {escaped(name)} is of dtype {_dtype(value)}, where the model has {_dtype(own)}")
    if own.is_meta:
        raise ValueError("the model is on the meta device, which holds no values: call model.to_empty(device='cpu')")
    converted = value.to(device=own.device, dtype=own.dtype)
    if floating and not _is_finite(converted):
        raise ValueError(f"{path}: {escaped(name)} holds NaN or infinity, or a value that is infinite in {_dtype(own)}")
    if not floating and not torch.equal(converted.to(value.dtype), value.to(own.device)):
        raise ValueError(f"{path}: {escaped(name)} holds values that are no {_dtype(own)}, which the model has")
    return converted


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _fill(
    model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], strict: bool, path: str | os.PathLike[str]
) -> None:
    """Loads the state, or restores the model's values and raises, whatever fails."""
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


def _oddity(value: Tensor) -> str | None:
    """Returns how a tensor is no ordinary dense array of numbers: its properties may raise or lie."""
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
    if value.is_complex() or value.dtype not in (*FLOATS, *INTEGERS, torch.bool, *FLOAT8):
        return f"of dtype {_dtype(value)}"
    if value.ndim > AXES:
        return f"of {value.ndim} axes"
    axes = list(zip(value.shape, value.stride(), strict=True))
    spread = sum((size - 1) * stride for size, stride in axes)
    held = math.prod(size for size, stride in axes if stride)
    return "a tensor whose values overlap in memory" if held > max(spread, 0) + 1 else None


def _way_out(model: nn.Module, found: Differences, weights: Mapping[str, Tensor]) -> str:
    """Returns the end of an error message: the model that the file is for, or what to check if that is unknown."""
    matches = identify(weights)
    fitting = [str(match) for match in matches if match.fits]
    if isinstance(model, FeatureMaps) and found.only_ends:
        return (
            f": it is for a classifier{f' ({fitting[0]})' if fitting else ''}; strict=False loads it without the "
            "classifier, and leaves the norms of the maps as they are"
        )
    if fitting:
        return f": it fits {' or '.join(fitting)}"
    closest = f" Of all models {matches[0]} is the closest to the file." if matches else ""
    notes = "".join(f"\n  {note}" for note in matches[0].notes) if matches else ""
    return f"; was the model made with the same name, number of classes and image size?{closest}{notes}"
