"""Models and data, as a command line names them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4vm.cli.render import say, stage

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

    from ptq4vm.data import ImageDataset

RANDOM = "random"
"""Stands for random weights in place of a file of weights."""


def is_model_folder(name: str) -> bool:
    """Returns whether a name is a repository's, or that of a folder with files of a model; loading tells what is wrong.

    No file of a repository is looked at: only loading opens the network.
    """
    from ptq4vm.hub.names import is_hub_name
    from ptq4vm.saving import CONFIG, WEIGHTS

    return is_hub_name(name) or any((Path(name) / file).exists() for file in (CONFIG, WEIGHTS))


def check_model_folder(name: str) -> None:
    from ptq4vm.hub.names import hint

    if not is_model_folder(name):
        raise ValueError(f"{name} is not the folder of a quantized model; 'ptq4vm quantize' makes one{hint(name)}")


def check_ema(args: argparse.Namespace) -> None:
    if args.ema and args.checkpoint in (None, RANDOM):
        raise ValueError("--ema takes the averaged weights of a file: give --checkpoint FILE with it")


def open_model(name: str, checkpoint: str | None, ema: bool = False) -> nn.Module:
    """Returns a quantized model from its folder, or a floating-point one by its name."""
    if not is_model_folder(name):
        return named_model(name, checkpoint, ema)

    import ptq4vm
    from ptq4vm.metadata import metadata_of

    quantized: Any = ptq4vm.load(name)
    metadata = metadata_of(quantized)
    preprocessing = metadata.architecture and metadata.architecture["preprocessing"]
    quantized.pretrained_cfg = preprocessing or _imagenet_preprocessing(name, metadata.input_shapes)
    quantized.num_classes = _classes(quantized)  # its head may be another than that of the name
    return quantized


def _imagenet_preprocessing(name: str, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Returns the preprocessing of a model that timm does not know: its metadata has the size of its inputs alone."""
    if len(shapes) != 1 or len(shapes[0]) != 3:
        raise ValueError(f"{name} takes {' and '.join(map(str, shapes))}; the command line reads images of three axes")
    say(f"{name} does not tell its preprocessing, that of ImageNet's models is taken …")
    return {"input_size": tuple(shapes[0])}


def _classes(quantized: GraphModule) -> int:
    """Returns how many logits a model has; 0 for a backbone, which has none."""
    import torch

    from ptq4vm.serialization.recorded_values import example_inputs

    with torch.inference_mode():
        logits = quantized(*example_inputs(quantized, 1))
    return logits.shape[1] if isinstance(logits, torch.Tensor) and logits.ndim == 2 else 0


def named_model(name: str, checkpoint: str | None, ema: bool) -> nn.Module:
    """Returns a model by its name, ours or timm's, with the weights of a file, random ones, or those timm knows of."""
    import torch

    from ptq4vm.models import create_model
    from ptq4vm.models.checkpoints import load_checkpoint

    file, pretrained = None if checkpoint == RANDOM else checkpoint, checkpoint is None
    _check_name(name, pretrained)
    options = {} if file is None else _options(name, file, ema)
    torch.manual_seed(0)
    try:
        model = create_model(name, pretrained, **options).eval()
    except Exception as error:
        if not pretrained:
            raise
        raise ValueError(f"the weights that timm has for {name} cannot be read: {error}; give --checkpoint") from error
    for note in () if file is None else load_checkpoint(model, file, ema=ema).notes:
        say(f"{file}: {note} …")
    return model


def _check_name(name: str, pretrained: bool) -> None:
    """Raises ValueError for a name that timm does not know, or has no weights for where they are wanted."""
    import timm

    from ptq4vm.hub.names import PREFIX, hint
    from ptq4vm.models.registry import is_model, pretrained_cfg

    if name.startswith(PREFIX):
        raise ValueError(
            f"{name}: {PREFIX} names a quantized model, and a floating-point one is wanted: give timm's name"
        )
    if Path(name).is_file():
        raise ValueError(
            f"{name} is a file: give its model's name, which 'ptq4vm inspect' tells, and --checkpoint {name}"
        )
    known, cfg = is_model(name), None
    try:
        cfg = pretrained_cfg(name) if known else None  # a model of --import may have none
    except RuntimeError:  # an unknown tag after the dot
        known = False
    if not known:
        family = timm.list_models(f"{name.split('_')[0]}_*", include_tags=True)[:8]
        names = f"it knows {', '.join(family)}" if family else "timm.list_models() names them"
        raise ValueError(
            f"{name} is neither a quantized model's folder nor a name that timm knows; {names}{hint(name)}"
        )
    published = cfg and (cfg.url or cfg.hf_hub_id or (cfg.file and Path(cfg.file).is_file()))
    if pretrained and not published:
        raise ValueError(
            f"timm has no weights for {name}: give --checkpoint FILE, or --checkpoint {RANDOM} to try without"
        )


def _options(name: str, checkpoint: str, ema: bool) -> dict[str, Any]:
    """Returns the number of classes and the size of images that a file has weights for, where not the name's."""
    from ptq4vm.inspection.contents import from_command_line
    from ptq4vm.models.checkpoints import open_checkpoint
    from ptq4vm.models.identify import match, names_of, registered

    if name.partition(".")[0] not in registered():
        return {}
    found = match(name, open_checkpoint(checkpoint, ema=ema, names=names_of(name)).weights)
    if not found.arguments or not from_command_line(found):
        return {}
    say(f"{found}, as {checkpoint} has it …")
    size = found.arguments.get("img_size")
    return {**found.arguments} | ({"pretrained_cfg_overlay": {"input_size": (3, size, size)}} if size else {})


def open_both(name: str) -> tuple[nn.Module, GraphModule]:
    """Returns a model in floating point, with random weights, and quantized: as saved, or W8A8 with scales from noise.

    Raises ValueError for a saved model whose network timm cannot build: it has no floating-point side.
    """
    import torch
    from timm.data import resolve_model_data_config

    import ptq4vm
    from ptq4vm.metadata import metadata_of
    from ptq4vm.quantization_specs import RangeSearch
    from ptq4vm.serialization.version_1 import build_model

    with stage("load"):
        torch.manual_seed(0)
        if is_model_folder(name):
            quantized = ptq4vm.load(name)
            try:
                return build_model(metadata_of(quantized).architecture, name).eval(), quantized
            except ValueError as error:
                raise ValueError(f"{error}, so there is no other way to run it to compare") from error
        model = named_model(name, RANDOM, False)
    with stage("quantize"):
        noise = torch.randn(2, *resolve_model_data_config(model)["input_size"])
        config = ptq4vm.QuantConfig(range_search=RangeSearch.MINMAX)
        return model, ptq4vm.quantize(model, [noise], config, progress=False)


def dataset_for(source: str, split: str, model: nn.Module, *, labels: bool = False) -> ImageDataset:
    """Returns images as the model takes them; with `labels` their classes must be the model's."""
    from ptq4vm.data import open_dataset, transform_for

    classes: Any = getattr(model, "num_classes", None) if labels else None
    return open_dataset(source, split, transform_for(model), num_classes=classes)


def images_for(model: nn.Module, args: argparse.Namespace) -> list[Tensor]:
    """Returns images to inspect a model with, few at a time: more are not faster, and take memory."""
    from ptq4vm.data import calibration_batches

    return calibration_batches(dataset_for(args.data_dir, args.split, model), args.images, 8, 0)


def loader_for(model: nn.Module, args: argparse.Namespace) -> Any:
    """Returns batches of the split; a limit takes images from all over it, since folders are sorted by class."""
    from torch.utils.data import Subset

    from ptq4vm.data import loader

    dataset: Any = dataset_for(args.data_dir, args.split, model, labels=True)
    if args.limit is not None and args.limit < len(dataset):
        dataset = Subset(dataset, [i * len(dataset) // args.limit for i in range(args.limit)])
    return loader(dataset, args.batch_size)
