"""Show what is in a quantized model or a file of weights; with images, what quantization did to each linear."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4vm.cli import sources
from ptq4vm.cli.arguments import DATA, add_split, add_weights, count
from ptq4vm.cli.destinations import check_folder
from ptq4vm.cli.render import Outcome, loss_table, stage
from ptq4vm.config_fields import refuse
from ptq4vm.optional_packages import require

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ptq4vm.inspection.layers import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "path", metavar="PATH", help="folder or hf-hub:ORG/NAME of a quantized model, a file of weights, or a timm name"
    )
    add("--graph", action="store_true", help="what torch.compile(…, backend='ptq4vm') fuses, and leaves")
    add("--data-dir", metavar="DIR", help=f"measure each linear on images: {DATA}")
    add_split(parser)
    add("--images", type=count, default=32, metavar="N", help="images to measure with")
    add("--against", metavar="NAME", help="the model before quantization, to compare outputs with")
    add_weights(parser, "for the model given by name: ")
    add("--output", metavar="DIR", help="folder for report.html and pictures of the linears' inputs")
    add("--pictures", type=count, default=4, metavar="N", help="linears to draw as PNG, the worst first")


def run(args: argparse.Namespace) -> Outcome:
    """Inspects a file, a folder, or a model on images, as the path and the options ask."""
    path, saved = Path(args.path), sources.is_model_folder(args.path)
    if path.is_file():
        return _inspect_file(path, args)
    _check_options(args, saved)
    if args.data_dir is not None:
        return _inspect_layers(args) if saved else _inspect_activations(args)
    if not saved:
        from ptq4vm.hub.names import hint

        raise ValueError(
            f"{path} is neither the folder of a quantized model (with config.json and model.safetensors) "
            "nor a file of weights (.pth, .ckpt, .safetensors); if it is a name that timm knows, give --data-dir DIR "
            f"with images to run it on{hint(args.path)}"
        )
    return _inspect_folder(args.path, args.graph)


def _check_options(args: argparse.Namespace, saved: bool) -> None:
    """Refuses options that would do nothing."""
    this = f"{args.path} is the folder of a quantized model" if saved else f"{args.path} is no such folder"
    for_folders, images = f"is for the folder of a quantized model; {this}", "needs images to run the model on: give"
    against, output, data = (value is not None for value in (args.against, args.output, args.data_dir))
    alone = saved and not against
    refuse(
        {
            f"--graph {for_folders}": args.graph and not saved,
            f"--against {for_folders}": against and not saved,
            f"--ema is for a file of weights; {this}": alone and args.ema,
            f"--checkpoint is for --against or a model's name; {this}": alone and args.checkpoint is not None,
            f"--against is the name of the floating-point model, and {args.against} is a quantized one; "
            "'ptq4vm evaluate' compares two of them": against and sources.is_model_folder(args.against),
            f"--against {images} --data-dir DIR with it": against and not data,
            f"--output {images} --data-dir DIR with it": output and not data,
            "--graph tells what is fused and --data-dir measures layers: give one of them": args.graph and data,
        }
    )
    if output:
        require("--output", "plot", "matplotlib")
        check_folder(args.output)
    sources.check_ema(args)


def _inspect_file(path: Path, args: argparse.Namespace) -> Outcome:
    from ptq4vm.inspection.contents import weights_report

    way_out = f"is for a model; {path} is a file: give its model's name and --checkpoint {path}"
    options = ("data_dir", "against", "checkpoint", "output")
    refuse(
        {f"--graph is for the folder of a quantized model; {path} is a file": args.graph}
        | {f"--{name.replace('_', '-')} {way_out}": getattr(args, name) is not None for name in options}
    )
    return Outcome(*weights_report(path, args.ema))


def _inspect_folder(path: str, graph: bool) -> Outcome:
    import ptq4vm
    from ptq4vm.formatting import coverage_line, linear_rows, table
    from ptq4vm.inspection.contents import graph_report
    from ptq4vm.metadata import metadata_of

    quantized = ptq4vm.load(path)
    if graph:
        return Outcome(*graph_report(quantized))
    contents, metadata, rows = _contents(quantized), metadata_of(quantized), linear_rows(quantized)
    blocks, covered = metadata.blocks, metadata.coverage
    said = [coverage_line(covered)] if covered.products else []
    lines = [*_heading(contents), *said, table(rows, _columns(rows, contents["config"])), *loss_table(blocks)]
    return Outcome(contents | {"linears": rows, "blocks": list(blocks)}, lines)


def _inspect_layers(args: argparse.Namespace) -> Outcome:
    """Measures each integer linear of a saved model on images, the worst first."""
    from ptq4vm.inspection import layers

    with stage("load"):
        quantized: Any = sources.open_model(args.path, None)
        batches, original = sources.images_for(quantized, args), None
        if args.against is not None:
            against = sources.named_model(args.against, args.checkpoint, args.ema)
            original = layers.original(quantized, against, batches[0])
    with stage("measure"):
        found = layers.measure(quantized, batches, against=original, figures=args.output is not None)
    rows, contents = layers.quantized_rows(quantized, found), _contents(quantized)
    bits = dict.fromkeys(f"W{row['weight_bits']}A{row['activation_bits']}" for row in rows)
    report = layers.Report(
        title=f"{_name(contents)}, {', '.join(sorted(bits))} {rows[0]['granularity']}",
        facts={"model": args.path} | ({} if args.against is None else {"against": args.against}),
        columns=_columns(rows, contents["config"]),
        rows=rows,
        layers=found,
    )
    return _measured(args, {"against": args.against}, contents, report)


def _inspect_activations(args: argparse.Namespace) -> Outcome:
    """Measures the inputs of a floating-point model's linears, the hardest to quantize first."""
    from ptq4vm.inspection import layers

    with stage("load"):
        model = sources.named_model(args.path, args.checkpoint, args.ema)
        batches = sources.images_for(model, args)
        graph = layers.floating(model, batches[0])
    with stage("measure"):
        found = layers.watch(graph, batches)
    rows = layers.floating_rows(graph, found)
    report = layers.Report(
        title=f"{args.path}, not quantized",
        facts={} if args.checkpoint is None else {"weights": args.checkpoint},
        columns=_columns(rows, ()),
        rows=rows,
        layers=found,
    )
    return _measured(args, {"model": args.path}, {}, report)


def _measured(args: argparse.Namespace, model: dict[str, Any], contents: dict[str, Any], report: Report) -> Outcome:
    from ptq4vm.formatting import table

    files, images = _draw(args, report), {"split": args.split, "images": args.images}
    lines = [*_heading(contents), table(report.rows, report.columns), *(f"wrote {file}" for file in files)]
    return Outcome({**model, **images, **contents, "linears": report.rows, "files": files}, lines)


def _draw(args: argparse.Namespace, report: Report) -> list[str]:
    """Draws the figures, if a folder for them is given; returns the files."""
    if args.output is None:
        return []
    from ptq4vm.inspection.figures import draw
    from ptq4vm.inspection.html import write_page

    with stage("draw"):
        folder, images = Path(args.output), f"{args.images} of {args.data_dir}, {args.split} split"
        report = dataclasses.replace(report, facts={**report.facts, "images": images})
        page = write_page(report, folder / "report.html")
        return [str(path) for path in (page, *draw(report, folder, args.pictures))]


def _contents(quantized: GraphModule) -> dict[str, Any]:
    from ptq4vm.formatting import linear_rows, model_bytes
    from ptq4vm.metadata import metadata_of

    metadata = metadata_of(quantized)
    return {
        "architecture": metadata.architecture,
        "input_shapes": [list(shape) for shape in metadata.input_shapes],
        "config": metadata.config.to_dict(),
        "coverage": dataclasses.asdict(metadata.coverage),
        "bytes": model_bytes(quantized),
        "weight_bytes": sum(row["weight_bytes"] for row in linear_rows(quantized)),
    }


def _name(contents: Mapping[str, Any]) -> str:
    return contents["architecture"]["name"] if contents["architecture"] else "a model timm does not know"


def _heading(contents: Mapping[str, Any]) -> list[str]:
    """Returns the name, size and config of a quantized model as lines; none for a floating-point one."""
    from ptq4vm.formatting import mebibytes

    if not contents:
        return []
    size = f"{mebibytes(contents['bytes'])}, of which {mebibytes(contents['weight_bytes'])} integer weights"
    config = (f"  {key}: {json.dumps(value)}" for key, value in contents["config"].items())
    return [f"{_name(contents)}, {size}", *config]


def _columns(rows: Sequence[Mapping[str, Any]], said: Container[str]) -> dict[str, str]:
    """Returns the headings of a table of linears, without what is said above it and is the same for all."""
    from ptq4vm.inspection.layers import COLUMNS

    shown = [key for key in (rows[0] if rows else {}) if key not in said or len({row[key] for row in rows}) > 1]
    return {key: COLUMNS.get(key, key.replace("_", " ")) for key in shown}
