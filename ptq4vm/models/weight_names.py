"""Finds the weights in the content of a file, and their names in the model."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ptq4vm.terminal_text import listing

CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "params", "network", "net", "weights", "model_state")
EMA_CONTAINERS = ("model_ema", "ema_model", "state_dict_ema", "ema", "params_ema", "ema_state_dict", "averaged_model")
DEPTH = 4
"""Largest number of containers within containers."""
WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Parts that torch.compile and others put anywhere in a name."""
OUTER = frozenset(("module", "model", "net", "network", "backbone"))
"""First parts of names under which training scripts and detectors keep the model, beside other things."""
COUNTERS = frozenset(("n_averaged",))
"""Buffers of torch.optim.swa_utils.AveragedModel that are not weights."""


def find_weights(content: object, path: Path, ema: bool) -> tuple[str | None, tuple[str, ...], Mapping[str, Any]]:
    """Returns the container of the weights, all containers of averaged weights, and the mapping of the weights.

    `ema` asks for averaged weights. Raises ValueError, which says what the file holds, where there are no such weights.
    """
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
    if held:  # empty, or with entries that are no tensors, which the caller names
        name = next(iter(chosen))
        return name, averaged, held[name]
    raise ValueError(
        f"{path}: no weights under {', '.join(CONTAINERS + EMA_CONTAINERS)}; it holds {listing(content) or 'nothing'}"
    )


def _innermost(content: Mapping[str, Any], depth: int = DEPTH) -> tuple[tuple[str, ...], Mapping[str, Any]] | None:
    """Returns the first mapping with tensors, and the containers on the way to it; None if there is none."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return (), content
    for name in CONTAINERS + EMA_CONTAINERS if depth else ():
        if isinstance(content.get(name), Mapping) and (inner := _innermost(content[name], depth - 1)) is not None:
            return (name, *inner[0]), inner[1]
    return None


def without_prefix(
    weights: Mapping[str, Any], wanted: Collection[str] | None, path: Path, ema: bool
) -> tuple[str, dict[str, str]]:
    """Returns the prefix of the weights' names, and the names without prefix and wrappers by the names in the file.

    `wanted` are the model's names, if a model is to be filled. Raises ValueError for weights that are there twice.
    """
    unwrapped = {name: _unwrapped(name) for name in weights if name not in COUNTERS}
    prefix = _common_prefix(list(unwrapped.values()))
    if wanted is not None:
        fitting = _fitting_prefixes(unwrapped.values(), frozenset(wanted))
        if len(fitting) > 1:  # some scripts keep averaged weights beside the others
            fitting = [each for each in fitting if ("ema" in each) == ema] or fitting
        if len(fitting) > 1:
            shown = listing(repr(each) for each in fitting)
            raise ValueError(f"{path}: these weights are there twice, under the prefixes {shown}")
        prefix = fitting[0] if fitting else prefix
    names = {old: new.removeprefix(prefix) for old, new in unwrapped.items() if new.startswith(prefix)}
    counts = Counter(names.values())
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"{path}: these weights are there twice, with and without a prefix: {listing(twice)}")
    return prefix, names


def _unwrapped(name: str) -> str:
    """Removes the parts of a name that wrappers add: nn.DataParallel at the front, torch.compile anywhere."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def _common_prefix(names: list[str]) -> str:
    """Returns the first parts that all names share; where they share none, those in `OUTER` that some have."""
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
    """Returns the prefixes whose removal leaves most of the model's names; several where weights are there twice.

    Returns none where fewer than half of the model's names are found: the file is for another model.
    """
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join((*parts[:end], "")) for end in range(len(parts)) if ".".join(parts[end:]) in wanted)
    most = max(counts.values(), default=0)
    return sorted(prefix for prefix, count in counts.items() if count == most and 2 * most > len(wanted))
