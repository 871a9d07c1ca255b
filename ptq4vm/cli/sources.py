"""Models and data, as a command line names them, for the commands of `cli`.

What a function needs is imported inside it, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4vm.text import escaped

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

    from ptq4vm.data import ImageDataset

RANDOM = "random"
"""In place of a file of weights."""


def say(text: str) -> None:
    """A line on standard error, for people; what came from files cannot act on their terminal."""
    print(escaped(text), file=sys.stderr, flush=True)


def is_saved(name: str) -> bool:
    """Whether a name is that of a folder with a saved model, of whatever kind: loading says what is wrong with it."""
    from ptq4vm.checkpoint import CONFIG, WEIGHTS

    return any((Path(name) / file).exists() for file in (CONFIG, WEIGHTS))


def check_ema(args: argparse.Namespace) -> None:
    if args.ema and args.checkpoint in (None, RANDOM):
        raise ValueError("--ema takes the averaged weights of a file: give --checkpoint FILE with it")


def open_model(name: str, checkpoint: str | None, ema: bool = False) -> nn.Module:
    """A quantized model from its folder, or a floating-point one by its name in timm."""
    if not is_saved(name):
        return named_model(name, checkpoint, ema)

    import ptq4vm
    from ptq4vm.metadata import metadata_of

    quantized: Any = ptq4vm.load(name)
    architecture = metadata_of(quantized).architecture
    # as timm's own models say it
    known = architecture["preprocessing"] if architecture else None
    quantized.pretrained_cfg = known or _preprocessing(name, quantized)
    quantized.num_classes = _classes(quantized)  # its head may be another than that of the name
    return quantized


def _preprocessing(name: str, quantized: GraphModule) -> dict[str, Any]:
    """Of a model that timm does not know, whose record has the size of its inputs alone."""
    from ptq4vm.metadata import metadata_of

    shapes = metadata_of(quantized).input_shapes
    if len(shapes) != 1 or len(shapes[0]) != 3:
        raise ValueError(f"{name} takes {' and '.join(map(str, shapes))}; the command line reads images of three axes")
    say(f"{name} does not tell its preprocessing, that of ImageNet's models is taken …")
    return {"input_size": tuple(shapes[0])}


def _classes(quantized: GraphModule) -> int:
    """How many logits it returns; 0 for a backbone, which has none."""
    import torch

    from ptq4vm.serialization.values import example_inputs

    with torch.inference_mode():
        logits = quantized(*example_inputs(quantized, 1))
    return logits.shape[1] if isinstance(logits, torch.Tensor) and logits.ndim == 2 else 0


def named_model(name: str, checkpoint: str | None, ema: bool) -> nn.Module:
    """A model by its name in timm, with the weights of a file, random ones, or those timm knows of."""
    import timm
    import torch

    import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
    from ptq4vm.models.checkpoints import load_checkpoint

    if Path(name).is_file():
        raise ValueError(
            f"{name} is a file: give its model's name, which 'ptq4vm inspect' tells, and --checkpoint {name}"
        )
    try:
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # an unknown tag after the dot
        cfg = None
    if cfg is None:
        family = timm.list_models(f"{name.split('_')[0]}_*", include_tags=True)[:8]
        known = f"it knows {', '.join(family)}" if family else "timm.list_models() names them"
        raise ValueError(f"{name} is neither a quantized model's folder nor a name that timm knows; {known}")
    published = cfg.url or cfg.hf_hub_id or (cfg.file and Path(cfg.file).is_file())
    if checkpoint is None and not published:
        raise ValueError(
            f"timm has no weights for {name}: give --checkpoint FILE, or --checkpoint {RANDOM} to try without"
        )
    options = {} if checkpoint in (None, RANDOM) else _options(name, checkpoint, ema)
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, pretrained=checkpoint is None, **options).eval()
    except Exception as error:
        if checkpoint is not None:
            raise
        raise ValueError(f"the weights that timm has for {name} cannot be read: {error}; give --checkpoint") from error
    if checkpoint not in (None, RANDOM):
        for note in load_checkpoint(model, checkpoint, ema=ema).notes:
            say(f"{checkpoint}: {note} …")
    return model


def _options(name: str, checkpoint: str, ema: bool) -> dict[str, Any]:
    """The number of classes and the size of images that a file has weights for, where they are not the name's."""
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
    """A model in floating point, with random weights, and quantized: its folder's, or W8A8 with scales from noise."""
    import torch

    import ptq4vm
    from ptq4vm.metadata import metadata_of
    from ptq4vm.specs import RangeSearch

    with stage("load", {}):
        torch.manual_seed(0)
        if is_saved(name):
            quantized = ptq4vm.load(name)
            return _floating(name, metadata_of(quantized).architecture), quantized
        model = named_model(name, RANDOM, False)
    with stage("quantize", {}):
        noise = torch.randn(2, *_input_shape(model))
        config = ptq4vm.QuantConfig(range_search=RangeSearch.MINMAX)
        return model, ptq4vm.quantize(model, [noise], config, progress=False)


def _floating(folder: str, architecture: dict[str, Any] | None) -> nn.Module:
    """The network of a saved model in floating point, with random weights; nothing but such a network is built."""
    from ptq4vm.serialization.version_1 import build_model

    try:
        return build_model(architecture, folder).eval()
    except ValueError as error:
        raise ValueError(f"{error}, so there is no other way to run it to compare") from error


def _input_shape(model: nn.Module) -> tuple[int, ...]:
    from timm.data import resolve_model_data_config

    return tuple(resolve_model_data_config(model)["input_size"])


def dataset_for(source: str, split: str, model: nn.Module, *, labels: bool = False) -> ImageDataset:
    """Images as the model takes them; with `labels` their classes must be the model's."""
    from ptq4vm.data import open_dataset, transform_for

    classes: Any = getattr(model, "num_classes", None) if labels else None
    return open_dataset(source, split, transform_for(model), num_classes=classes)


def images_for(model: nn.Module, args: argparse.Namespace) -> list[Tensor]:
    """Images to inspect a model with, few at a time: more are not faster, and take memory."""
    from ptq4vm.data import calibration_batches

    return calibration_batches(dataset_for(args.data_dir, args.split, model), args.images, 8, 0)


def loader_for(model: nn.Module, args: argparse.Namespace) -> Any:
    """Batches of the split; a limit takes images from all over it, since folders are sorted by class."""
    from torch.utils.data import Subset

    from ptq4vm.data import loader

    dataset: Any = dataset_for(args.data_dir, args.split, model, labels=True)
    if args.limit is not None and args.limit < len(dataset):
        dataset = Subset(dataset, [i * len(dataset) // args.limit for i in range(args.limit)])
    return loader(dataset, args.batch_size)


@contextlib.contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Says what begins, since it takes a while, and adds how long it took."""
    say(f"{name} …")
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
