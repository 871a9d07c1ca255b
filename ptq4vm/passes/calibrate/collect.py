"""Collecting calibration images from a loader: copied, checked, and put together by input of the model.

Shapes: B images; every input is (B, …) with the sizes of the example that the model was prepared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm import tqdm

from ptq4vm.graph.partition import NamedTensors

MOST_IMAGES = 4096
"""Images that are taken from a loader without a length: one that never ends raises an error before memory is full."""


def collect_inputs(
    gm: GraphModule, loader: Iterable[Any], max_images: int | None = None, ends: bool = True, progress: bool = False
) -> NamedTensors:
    """Returns all calibration inputs by the name of their placeholder; reads the loader once and copies its batches.

    An item is a tensor, a tuple or list that begins with the inputs, or a mapping or named tuple that holds them by
    argument name; what else an item holds, such as labels, is ignored. Reads no more batches than `max_images` need.
    Raises ValueError, which names the batch (from 0), what came and what is wanted, and for a loader that is empty, or
    that yields more than `MOST_IMAGES` and is not known to end.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images must be at least 1, got {max_images}")
    inputs = gm.graph.find_nodes(op="placeholder")
    batches = list(_limited(_batches(gm, inputs, loader), max_images, ends, progress))
    if not batches:
        raise ValueError("the calibration loader is empty; give it at least one image (the paper takes 256)")
    return {node.name: torch.cat([batch[i] for batch in batches]) for i, node in enumerate(inputs)}


def _limited(
    batches: Iterable[Sequence[Tensor]], limit: int | None, ends: bool, progress: bool
) -> Iterator[Sequence[Tensor]]:
    """Yields the first `limit` images, and no batch more than they need."""
    seen = 0
    with tqdm(desc="images", unit="image", disable=not progress) as bar:
        for batch in batches:
            taken = [value[: None if limit is None else limit - seen] for value in batch]
            seen += len(taken[0])
            bar.update(len(taken[0]))
            if len(taken[0]):
                yield taken
            if limit is None and not ends and seen > MOST_IMAGES:
                raise ValueError(
                    f"the calibration loader has no length and gave more than {MOST_IMAGES} images, all of which are "
                    "held in memory (the paper takes 256): pass max_images= to take as many and stop"
                )
            if seen == limit:
                return


def has_length(loader: Any) -> bool:
    """Whether a loader says how many batches it has; some that have `__len__` raise TypeError."""
    try:
        return len(loader) >= 0
    except TypeError:
        return False


def _batches(gm: GraphModule, inputs: Sequence[Node], loader: Iterable[Any]) -> Iterator[list[Tensor]]:
    device = next(itertools.chain(gm.parameters(), gm.buffers())).device
    names = [str(node.target) for node in inputs]
    for index, item in enumerate(loader):
        place = f"calibration batch {index}"
        values = select_inputs(item, names, place)
        batch = [_checked(node, value, place).to(device) for node, value in zip(inputs, values, strict=True)]
        sizes = {len(value) for value in batch}
        if len(sizes) > 1:
            counts = ", ".join(f"{name!r} {len(value)}" for name, value in zip(names, batch, strict=True))
            raise ValueError(f"{place}: its inputs have different numbers of images ({counts}); give all the same")
        yield batch


def select_inputs(item: Any, names: Sequence[str], place: str) -> list[Tensor]:
    """Returns the inputs that a loader's item holds, by argument name or in order, as ordinary tensors."""
    if isinstance(item, (tuple, list)) and item and isinstance(item[0], (Mapping, tuple, list)):
        item = item[0]  # (inputs, labels)
    if hasattr(item, "_asdict") and all(hasattr(item, name) for name in names):
        item = item._asdict()
    if isinstance(item, Mapping):
        missing = [name for name in names if name not in item]
        if missing:
            have = ", ".join(map(repr, item))
            raise ValueError(f"{place}: the model's input {missing[0]!r} is missing; it holds {have}; rename a key")
        values = [item[name] for name in names]
    else:
        values = list(item[: len(names)]) if isinstance(item, (tuple, list)) else [item]
    if len(values) < len(names) or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        wanted = f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names)})"
        raise ValueError(f"{place}: the model takes {wanted}; the loader gave ({kinds})")
    return [value.as_subclass(Tensor) if value.layout is torch.strided else value for value in values]


def _checked(node: Node, value: Tensor, place: str) -> Tensor:
    """Returns a copy in the example's type."""
    want, name = node.meta.get("val"), str(node.target)
    if not isinstance(want, Tensor) or not want.dim():
        raise ValueError(f"the model's input {name!r} is no tensor with a batch; make it a constant of the model")
    shape = tuple(want.shape[1:])
    if value.dim() != want.dim() or tuple(value.shape[1:]) != shape:
        hint = "; a batch axis is missing: use unsqueeze(0)" if tuple(value.shape) == shape else ""
        raise ValueError(
            f"{place}: input {name!r} has the shape {tuple(value.shape)}, and the model was prepared for "
            f"({', '.join(map(str, ('images', *shape)))}){hint}; resize it, or prepare the model with such inputs"
        )
    if value.device.type == "meta" or value.layout != torch.strided:
        kind = "on the device meta, without values" if value.device.type == "meta" else f"of layout {value.layout}"
        raise ValueError(f"{place}: input {name!r} is {kind}; give a dense tensor with values")
    if value.dtype != want.dtype and not _widens(value.dtype, want.dtype):
        raise ValueError(
            f"{place}: input {name!r} is {value.dtype}, and the model was prepared for {want.dtype}; convert it as the "
            "example inputs were, with the same scaling and normalization"
        )
    copied = value.detach().to(want.dtype, copy=True)
    if not torch.isfinite(copied).all():
        raise ValueError(f"{place}: input {name!r} has values that are not finite")
    return copied


def _widens(have: torch.dtype, want: torch.dtype) -> bool:
    """Whether a type holds all values of another of its kind, so that converting is exact and means the same."""
    if have.is_floating_point and want.is_floating_point:
        less, more = torch.finfo(have), torch.finfo(want)
        return less.max <= more.max and less.eps >= more.eps and less.smallest_normal >= more.smallest_normal
    if {have, want} <= _INTEGERS:
        return torch.iinfo(have).min >= torch.iinfo(want).min and torch.iinfo(have).max <= torch.iinfo(want).max
    return False


_INTEGERS = {
    getattr(torch, name) for name in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
}
