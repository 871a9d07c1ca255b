"""What `ptq4vm inspect` tells: of a saved model, its graph, its layers on images, or a file of weights.

A result for programs and lines for people. What a function needs is imported inside it, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4vm.cli.outputs import check_folder
from ptq4vm.cli.sources import check_ema, images_for, is_saved, named_model, open_model, stage
from ptq4vm.extras import require

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ptq4vm.inspection.layers import Report

Found = tuple[dict[str, Any], list[str]]


def inspect(args: argparse.Namespace) -> Found:
    """The one of the four that the path and the options ask for."""
    path, saved = Path(args.path), is_saved(args.path)
    if path.is_file():
        return _inspect_file(path, args)
    _check_options(args, saved)
    if args.data_dir is not None:
        return _inspect_layers(args) if saved else _inspect_activations(args)
    if not saved:
        raise ValueError(
            f"{path} is neither the folder of a quantized model (with config.json and model.safetensors) "
            "nor a file of weights (.pth, .ckpt, .safetensors); if it is a name that timm knows, give --data-dir DIR "
            "with images to run it on"
        )
    return _inspect_folder(path, args.graph)


def _check_options(args: argparse.Namespace, saved: bool) -> None:
    """Refuses options that would do nothing."""
    what = f"{args.path} is the folder of a quantized model" if saved else f"{args.path} is no such folder"
    if not saved and (args.graph or args.against is not None):
        raise ValueError(f"{'--graph' if args.graph else '--against'} is for the folder of a quantized model; {what}")
    if saved and args.against is None and (args.ema or args.checkpoint is not None):
        option = "--ema is for a file of weights" if args.ema else "--checkpoint is for --against or a model's name"
        raise ValueError(f"{option}; {what}")
    if args.against is not None and is_saved(args.against):
        raise ValueError(
            f"--against is the name of the floating-point model, and {args.against} is a quantized one; "
            "'ptq4vm evaluate' compares two of them"
        )
    for option in ("against", "output"):
        if getattr(args, option) is not None and args.data_dir is None:
            raise ValueError(f"--{option} needs images to run the model on: give --data-dir DIR with it")
    if args.graph and args.data_dir is not None:
        raise ValueError("--graph tells what is fused and --data-dir measures layers: give one of them")
    if args.output is not None:
        require("--output", "plot", "matplotlib")
        check_folder(args.output)
    check_ema(args)


def _inspect_file(path: Path, args: argparse.Namespace) -> Found:
    from ptq4vm.inspection.contents import weights_report

    if args.graph:
        raise ValueError(f"--graph is for the folder of a quantized model; {path} is a file")
    for option in ("data_dir", "against", "checkpoint", "output"):
        if getattr(args, option) is not None:
            raise ValueError(
                f"--{option.replace('_', '-')} is for a model; {path} is a file: give its model's name and "
                f"--checkpoint {path}"
            )
    return weights_report(path, args.ema)


def _inspect_folder(path: Path, graph: bool) -> Found:
    import ptq4vm
    from ptq4vm.inspection.contents import graph_report
    from ptq4vm.metadata import metadata_of
    from ptq4vm.report import linear_rows, table

    quantized = ptq4vm.load(path)
    if graph:
        return graph_report(quantized)
    metadata, rows = metadata_of(quantized), linear_rows(quantized)
    result = _contents(quantized) | {"linears": rows, "blocks": list(metadata.blocks)}
    lines = [*_heading(result), table(rows, _columns(rows, result["config"])), *losses(metadata.blocks)]
    return result, lines


def _inspect_layers(args: argparse.Namespace) -> Found:
    """Each integer linear of a saved model on images, the worst first."""
    from ptq4vm.inspection import layers
    from ptq4vm.inspection.layers import Report
    from ptq4vm.report import table

    with stage("load", {}):
        quantized: Any = open_model(args.path, None)
        batches = images_for(quantized, args)
        original = None
        if args.against is not None:
            original = layers.original(quantized, named_model(args.against, args.checkpoint, args.ema), batches[0])
    with stage("measure", {}):
        found = layers.measure(quantized, batches, against=original, figures=args.output is not None)
    rows = layers.quantized_rows(quantized, found)
    contents = _contents(quantized)
    result = {"against": args.against, "split": args.split, "images": args.images, **contents, "linears": rows}
    columns = _columns(rows, contents["config"])
    bits = dict.fromkeys(f"W{row['weight_bits']}A{row['activation_bits']}" for row in rows)
    title = f"{_name(contents)}, {', '.join(sorted(bits))} {rows[0]['granularity']}"
    facts = {"model": args.path} | ({} if args.against is None else {"against": args.against})
    files = _draw(args, Report(title=title, facts=facts, columns=columns, rows=rows, layers=found))
    lines = [*_heading(contents), table(rows, columns), *(f"wrote {file}" for file in files)]
    return result | {"files": files}, lines


def _inspect_activations(args: argparse.Namespace) -> Found:
    """What the linears of a floating-point model see, the hardest to quantize first."""
    from ptq4vm.inspection import layers
    from ptq4vm.inspection.layers import Report
    from ptq4vm.report import table

    with stage("load", {}):
        model = named_model(args.path, args.checkpoint, args.ema)
        batches = images_for(model, args)
        graph = layers.floating(model, batches[0])
    with stage("measure", {}):
        found = layers.watch(graph, batches)
    rows = layers.floating_rows(graph, found)
    columns, title = _columns(rows, ()), f"{args.path}, not quantized"
    facts = {} if args.checkpoint is None else {"weights": args.checkpoint}
    files = _draw(args, Report(title=title, facts=facts, columns=columns, rows=rows, layers=found))
    result = {"model": args.path, "split": args.split, "images": args.images, "linears": rows, "files": files}
    lines = [table(rows, columns), *(f"wrote {file}" for file in files)]
    return result, lines


def _draw(args: argparse.Namespace, report: Report) -> list[str]:
    """The figures, if a folder for them is given; returns the files."""
    if args.output is None:
        return []
    from ptq4vm.inspection.figures import draw
    from ptq4vm.inspection.html import write_page

    with stage("draw", {}):
        folder, images = Path(args.output), f"{args.images} of {args.data_dir}, {args.split} split"
        report = dataclasses.replace(report, facts={**report.facts, "images": images})
        page = write_page(report, folder / "report.html")
        return [str(path) for path in (page, *draw(report, folder, args.pictures))]


def _contents(quantized: GraphModule) -> dict[str, Any]:
    from ptq4vm.metadata import metadata_of
    from ptq4vm.report import linear_rows, model_bytes

    metadata = metadata_of(quantized)
    return {
        "architecture": metadata.architecture,
        "input_shapes": [list(shape) for shape in metadata.input_shapes],
        "config": metadata.config.to_dict(),
        "bytes": model_bytes(quantized),
        "weight_bytes": sum(row["weight_bytes"] for row in linear_rows(quantized)),
    }


def _name(contents: dict[str, Any]) -> str:
    return contents["architecture"]["name"] if contents["architecture"] else "a model timm does not know"


def _heading(contents: dict[str, Any]) -> list[str]:
    from ptq4vm.report import mebibytes

    size = f"{mebibytes(contents['bytes'])}, of which {mebibytes(contents['weight_bytes'])} integer weights"
    return [
        f"{_name(contents)}, {size}",
        *(f"  {key}: {json.dumps(value)}" for key, value in contents["config"].items()),
    ]


def _columns(rows: Sequence[dict[str, Any]], said: Container[str]) -> dict[str, str]:
    """Headings of a table of linears, without what is said above it and is the same for all."""
    from ptq4vm.inspection.layers import COLUMNS

    shown = [key for key in (rows[0] if rows else {}) if key not in said or len({row[key] for row in rows}) > 1]
    return {key: COLUMNS.get(key, key.replace("_", " ")) for key in shown}


def losses(blocks: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the losses of learning; nothing where nothing was learned."""
    from ptq4vm.report import table

    rows = [block for block in blocks if "loss_after" in block]
    columns = {"block": "block", "loss_before": "loss before", "loss_after": "loss after"}
    return [table(rows, columns)] if rows else []
