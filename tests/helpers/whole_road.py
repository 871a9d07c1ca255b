"""The whole road of a model, with every step held to its laws."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from helpers.lowering import check
from ptq4vm import QuantConfig, calibrate, convert, load, prepare, save
from ptq4vm.metadata import LinearMetadata, metadata_of


def travel(
    model: nn.Module, x: Tensor, config: QuantConfig, folder: Path, *, model_for_load: nn.Module | None
) -> Sequence[LinearMetadata]:
    """Prepares, calibrates with two images, converts, saves and loads; x is three images.

    Returns the records of the linears.
    """
    return metadata_of(travelled(model, x, config, folder, model_for_load=model_for_load)).linears


def travelled(
    model: nn.Module, x: Tensor, config: QuantConfig, folder: Path, *, model_for_load: nn.Module | None
) -> GraphModule:
    """Returns the lowered graph at the end of `travel`."""
    model.eval().requires_grad_(False)
    prepared = prepare(model, (x[:2],), config)
    for images in (1, 3):
        _each(torch.testing.assert_close, prepared(x[:images]), model(x[:images]), rtol=1e-4, atol=1e-5)
    calibrate(prepared, [x[:2]], progress=False)
    quantized = convert(prepared)
    assert check(prepared, x) == len(metadata_of(prepared).linears)
    assert all(torch.isfinite(value).all() for value in tree_leaves(quantized(x)))
    _each(_equal, convert(prepared, lower=False)(x), prepared(x))
    loaded = load(save(quantized, folder / "model"), model=model_for_load)
    for images in (1, 3):
        _each(_equal, loaded(x[:images]), quantized(x[:images]))
    return quantized


def _each(law, ours, theirs, **options) -> None:
    for value, wanted in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        law(value, wanted, **options)


def _equal(value: Tensor, wanted: Tensor) -> None:
    assert torch.equal(value, wanted)
