"""Calibrate on images of the train split, convert, save."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ptq4vm.cli import sources
from ptq4vm.cli.arguments import DATA, LARGEST, add_weights, between, count
from ptq4vm.cli.destinations import check_apart, check_folder
from ptq4vm.cli.render import Outcome, loss_table, stage
from ptq4vm.recipes import PRESETS, RECIPES, parse

if TYPE_CHECKING:
    from ptq4vm.config import QuantConfig

CONFIGS = f"{', '.join(PRESETS)}, or a recipe with its bits, such as best4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, seed = parser.add_argument, between(-LARGEST, 2**63 - 1)
    add("model", metavar="MODEL", help="timm name, such as vim_tiny_patch16_224")
    add("--data-dir", required=True, metavar="DIR", help=DATA)
    add("--output", required=True, metavar="DIR", help="folder to save the quantized model in")
    add_weights(parser)
    add("--config", default="w8a8", help=f"{CONFIGS}, or a .json file")
    add("--images", type=count, default=256, metavar="N", help="images to calibrate with")
    add("--batch-size", type=count, default=32, metavar="N", help="images read at once")
    add("--seed", type=seed, default=0, help="chooses the images, and their order in a preset's learning")
    add("--resume-dir", metavar="DIR", help="keep finished blocks here, and continue from them")
    listed = (f"  {recipe.name:18} {recipe.description}" for recipe in RECIPES.values())
    parser.epilog = "\n".join(("recipes (w8a8, w6a6 and w4a4 are ptq4vm's):", *listed))


def run(args: argparse.Namespace) -> Outcome:
    """Checks all that can be known before the work, then does it in five stages."""
    import ptq4vm
    from ptq4vm.data import calibration_batches
    from ptq4vm.formatting import mebibytes, model_bytes, table
    from ptq4vm.metadata import metadata_of
    from ptq4vm.saving import free_folder

    output, config = free_folder(args.output), _config(args.config, args.seed)
    check_folder(output)
    if args.resume_dir is not None:
        check_apart(output, args.resume_dir)
        check_folder(args.resume_dir)
    sources.check_ema(args)
    seconds: dict[str, float] = {}
    with stage("load", seconds):
        model = sources.named_model(args.model, args.checkpoint, args.ema)
        dataset = sources.dataset_for(args.data_dir, "train", model)
        batches = calibration_batches(dataset, args.images, args.batch_size, args.seed)
    with stage("prepare", seconds):
        prepared = ptq4vm.prepare(model, (batches[0],), config)
    with stage("calibrate", seconds):
        ptq4vm.calibrate(prepared, batches, resume_dir=args.resume_dir, progress=sys.stderr.isatty())
    with stage("convert", seconds):
        quantized = ptq4vm.convert(prepared)
    with stage("save", seconds):
        ptq4vm.save(quantized, output)

    metadata = metadata_of(quantized)
    before, after, memory = model_bytes(model), model_bytes(quantized), _peak_memory()
    result = {
        "model": args.model,
        "output": str(output),
        "config": config.to_dict(),
        "images": args.images,
        "linears": len(metadata.linears),
        "coverage": dataclasses.asdict(metadata.coverage),
        "bytes_before": before,
        "bytes_after": after,
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "blocks": list(metadata.blocks),
    }
    lines = [
        *loss_table(metadata.blocks),
        f"{len(metadata.linears)} linears, {mebibytes(before)} → {mebibytes(after)} ({before / after:.2f}× smaller)",
        table([seconds | {"total": sum(seconds.values())}]) + "  (seconds)",
        f"peak memory {mebibytes(memory)}",
        f"saved in {output}",
    ]
    return Outcome(result, lines)


def _config(text: str, seed: int) -> QuantConfig:
    """Returns the config of a recipe by name, or of a JSON file, which has its own seed."""
    from ptq4vm.config import QuantConfig

    if (found := parse(text)) is not None:
        return QuantConfig.recipe(*found, seed=seed)
    if not text.endswith(".json"):
        raise ValueError(f"{text!r} is no config: give {CONFIGS} ({', '.join(RECIPES)}), or a .json file")
    try:
        return QuantConfig.from_json(Path(text).read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{text}: {error}") from error


def _peak_memory() -> int | None:
    """Returns the most bytes this process has held in memory, where the system counts them."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
