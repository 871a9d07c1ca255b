"""The command line: quantize, evaluate, benchmark, inspect, export, doctor.

A command returns what it found as a dictionary and as text; `main` prints one of the two. Whatever is printed on the
way goes to standard error. What a command needs is imported inside it, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4vm import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

    from ptq4vm.config import QuantConfig
    from ptq4vm.data import ImageDataset
    from ptq4vm.inspection.layers import Report

RANDOM = "random"
KINDS = (
    "quantized, fused, compiled, compiled-half, eager-fp32, eager-loop, compiled-fp32, compiled-bf16, "
    "torchao-int8, onnxruntime-int8, openvino-int8"
)
PRESETS = (
    "w8a8, w6a6, w4a4, or a recipe with its bits: best4, ptq4vm4, ptq4vm_released4, pts+truncation4, pts4, "
    "per_token_dynamic4, per_tensor4, smoothquant4, minmax4"
)
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command found, for programs and for people."""

    result: dict[str, Any]
    text: str
    code: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; wrong usage exits with 2 as argparse does."""
    args = _parser().parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            outcome = args.command(args)
    except KeyboardInterrupt:
        print(f"ptq4vm: {_interrupted(args)}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"ptq4vm: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    try:
        print(json.dumps(outcome.result, indent=2) if args.json else outcome.text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; Python must not try to flush again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return outcome.code


def _is_expected(error: Exception) -> bool:
    """Whether the message says all there is to say; anything else is our mistake and keeps its traceback."""
    if isinstance(error, RuntimeError):
        from ptq4vm.graph import CaptureError

        return isinstance(error, CaptureError)
    return isinstance(error, (ValueError, OSError, ImportError))


def _interrupted(args: argparse.Namespace) -> str:
    if "resume_dir" not in args:
        return "interrupted"
    if args.resume_dir is None:
        return "interrupted; nothing is kept (with --resume-dir finished blocks would be)"
    return f"interrupted; finished blocks are kept in {args.resume_dir}: the same command continues there"


def quantize(args: argparse.Namespace) -> Outcome:
    """Calibrate on images of the train split, convert, save."""
    import ptq4vm
    from ptq4vm.checkpoint import free_folder
    from ptq4vm.data import calibration_batches
    from ptq4vm.record import record_of
    from ptq4vm.report import mebibytes, model_bytes, table

    output, config = free_folder(args.output), _config(args.config, args.seed)  # said before the work, not after
    _check_ema(args)
    seconds: dict[str, float] = {}
    with _stage("load", seconds):
        model = _named_model(args.model, args.checkpoint, args.ema)
        dataset = _dataset(args.data_dir, "train", model)
        batches = calibration_batches(dataset, args.images, args.batch_size, args.seed)
    with _stage("prepare", seconds):
        prepared = ptq4vm.prepare(model, (batches[0],), config)
    with _stage("calibrate", seconds):
        ptq4vm.calibrate(prepared, batches, resume_dir=args.resume_dir, progress=sys.stderr.isatty())
    with _stage("convert", seconds):
        quantized = ptq4vm.convert(prepared)
    with _stage("save", seconds):
        ptq4vm.save(quantized, output)

    record = record_of(quantized)
    before, after, memory = model_bytes(model), model_bytes(quantized), _peak_memory()
    result = {
        "model": args.model,
        "output": str(output),
        "config": config.to_dict(),
        "images": args.images,
        "linears": len(record.linears),
        "bytes_before": before,
        "bytes_after": after,
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "blocks": list(record.blocks),
    }
    lines = [
        *_losses(record.blocks),
        f"{len(record.linears)} linears, {mebibytes(before)} → {mebibytes(after)} ({before / after:.2f}× smaller)",
        table([seconds | {"total": sum(seconds.values())}]) + "  (seconds)",
        f"peak memory {mebibytes(memory)}",
        f"saved in {output}",
    ]
    return Outcome(result=result, text="\n".join(lines))


def evaluate(args: argparse.Namespace) -> Outcome:
    """Accuracy on a split, and agreement with another model."""
    from ptq4vm import evaluate as evaluation
    from ptq4vm.report import table

    names = [args.model] if args.against is None else [args.model, args.against]
    if args.checkpoint is not None and all(map(_is_saved, names)):
        raise ValueError(f"--checkpoint is for a model given by name; {' and '.join(names)} has its own weights")
    _check_ema(args)
    models = [_model(name, args.checkpoint, args.ema) for name in names]
    loaders = [_loader(model, args) for model in models]
    reference = None if args.against is None else evaluation.predictions(models[1], loaders[1])
    found = evaluation.evaluate(models[0], loaders[0], reference_predictions=reference)
    result = {"model": args.model, "against": args.against, "split": args.split, **found.to_dict()}
    columns = {"model": "model", "images": "images", "top1": "top-1 %", "top5": "top-5 %"}
    if args.against is not None:
        columns |= {"agreement": f"% as {args.against}", "divergence": "KL"}
    return Outcome(result=result, text=table([result], columns | {"loss": "loss", "seconds": "seconds"}))


def benchmark(args: argparse.Namespace) -> Outcome:
    """Time a quantized model against other ways to run the same network, on random images."""
    from ptq4vm.benchmark.run import Plan, check_picture, run
    from ptq4vm.record import record_of
    from ptq4vm.report import write_csv

    if args.picture is not None:
        check_picture(args.picture)
    kinds = (args.kind, *args.against)
    twice = [kind for kind in kinds if kinds.count(kind) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; a kind is compared with other ones")
    others: dict[str, Any] = {name: _model(name, None) for name in args.against if _is_saved(name)}
    plan = Plan(
        kinds=kinds,
        others=tuple(others),
        batch_sizes=tuple(args.batch_size),
        threads=tuple(args.threads),
        repeats=args.repeats,
        layers=args.layers or args.picture is not None,
        memory=args.memory,
    )
    model, quantized = _both(args.model)
    shapes = {name: record_of(graph).input_shapes[0] for name, graph in {args.model: quantized, **others}.items()}
    if len(set(shapes.values())) > 1:
        sizes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes.items())
        raise ValueError(f"models are compared on the same images, but these take different ones: {sizes}")
    findings = run(args.model, shapes[args.model], model, quantized, plan, others)
    if args.csv is not None:
        write_csv(args.csv, findings.rows())
    if args.picture is not None:
        findings.draw(args.picture)
    return Outcome(result=findings.to_dict(), text=str(findings))


def inspect(args: argparse.Namespace) -> Outcome:
    """What is in a quantized model or a file of weights; with images, what quantization did to each linear."""
    path, saved = Path(args.path), _is_saved(args.path)
    if path.is_file():
        return _inspect_file(path, args)
    _check_inspect(args, saved)
    if args.data_dir is not None:
        return _inspect_layers(args) if saved else _inspect_activations(args)
    if not saved:
        raise ValueError(
            f"{path} is neither the folder of a quantized model (with config.json and model.safetensors) "
            "nor a file of weights (.pth, .ckpt, .safetensors); if it is a name that timm knows, give --data-dir DIR "
            "with images to run it on"
        )
    return _inspect_folder(path, args.graph)


def _check_inspect(args: argparse.Namespace, saved: bool) -> None:
    """Refuses options that would do nothing."""
    what = f"{args.path} is the folder of a quantized model" if saved else f"{args.path} is no such folder"
    if not saved and (args.graph or args.against is not None):
        raise ValueError(f"{'--graph' if args.graph else '--against'} is for the folder of a quantized model; {what}")
    if saved and args.against is None and (args.ema or args.checkpoint is not None):
        option = "--ema is for a file of weights" if args.ema else "--checkpoint is for --against or a model's name"
        raise ValueError(f"{option}; {what}")
    if args.against is not None and _is_saved(args.against):
        raise ValueError(
            f"--against is the name of the floating-point model, and {args.against} is a quantized one; "
            "'ptq4vm evaluate' compares two of them"
        )
    for option in ("against", "output"):
        if getattr(args, option) is not None and args.data_dir is None:
            raise ValueError(f"--{option} needs images to run the model on: give --data-dir DIR with it")
    if args.graph and args.data_dir is not None:
        raise ValueError("--graph tells what is fused and --data-dir measures layers: give one of them")
    if args.output is not None and Path(args.output).exists() and not Path(args.output).is_dir():
        raise FileExistsError(f"{args.output} is a file; choose a folder for the figures")
    _check_ema(args)


def _inspect_file(path: Path, args: argparse.Namespace) -> Outcome:
    from ptq4vm.inspection.contents import weights_report

    if args.graph:
        raise ValueError(f"--graph is for the folder of a quantized model; {path} is a file")
    for option in ("data_dir", "against", "checkpoint", "output"):
        if getattr(args, option) is not None:
            raise ValueError(
                f"--{option.replace('_', '-')} is for a model; {path} is a file: give its model's name and "
                f"--checkpoint {path}"
            )
    result, lines = weights_report(path, args.ema)
    return Outcome(result=result, text="\n".join(lines))


def _inspect_folder(path: Path, graph: bool) -> Outcome:
    import ptq4vm
    from ptq4vm.inspection.contents import graph_report
    from ptq4vm.record import record_of
    from ptq4vm.report import linear_rows, table

    quantized = ptq4vm.load(path)
    if graph:
        result, lines = graph_report(quantized)
        return Outcome(result=result, text="\n".join(lines))
    record, rows = record_of(quantized), linear_rows(quantized)
    result = _contents(quantized) | {"linears": rows, "blocks": list(record.blocks)}
    lines = [*_heading(result), table(rows, _columns(rows, result["config"])), *_losses(record.blocks)]
    return Outcome(result=result, text="\n".join(lines))


def _inspect_layers(args: argparse.Namespace) -> Outcome:
    """Each integer linear of a saved model on images, the worst first."""
    from ptq4vm.inspection import layers
    from ptq4vm.inspection.layers import Report
    from ptq4vm.report import table

    with _stage("load", {}):
        quantized: Any = _model(args.path, None)
        batches = _images(quantized, args)
        original = None
        if args.against is not None:
            original = layers.original(quantized, _named_model(args.against, args.checkpoint, args.ema), batches[0])
    with _stage("measure", {}):
        found = layers.measure(quantized, batches, against=original, figures=args.output is not None)
    rows = layers.quantized_rows(quantized, found)
    contents = _contents(quantized)
    result = {"against": args.against, "split": args.split, "images": args.images, **contents, "linears": rows}
    columns = _columns(rows, contents["config"])
    bits = dict.fromkeys(f"W{row['weight_bits']}A{row['activation_bits']}" for row in rows)
    title = f"{_name(contents)}, {', '.join(sorted(bits))} {rows[0]['granularity']}"
    facts = {"model": args.path} | ({} if args.against is None else {"against": args.against})
    files = _draw(args, Report(title=title, facts=facts, columns=columns, rows=rows, layers=found))
    text = [*_heading(contents), table(rows, columns), *(f"wrote {file}" for file in files)]
    return Outcome(result=result | {"files": files}, text="\n".join(text))


def _inspect_activations(args: argparse.Namespace) -> Outcome:
    """What the linears of a floating-point model see, the hardest to quantize first."""
    from ptq4vm.inspection import layers
    from ptq4vm.inspection.layers import Report
    from ptq4vm.report import table

    with _stage("load", {}):
        model = _named_model(args.path, args.checkpoint, args.ema)
        batches = _images(model, args)
        graph = layers.floating(model, batches[0])
    with _stage("measure", {}):
        found = layers.watch(graph, batches)
    rows = layers.floating_rows(graph, found)
    columns, title = _columns(rows, ()), f"{args.path}, not quantized"
    facts = {} if args.checkpoint is None else {"weights": args.checkpoint}
    files = _draw(args, Report(title=title, facts=facts, columns=columns, rows=rows, layers=found))
    result = {"model": args.path, "split": args.split, "images": args.images, "linears": rows, "files": files}
    text = [table(rows, columns), *(f"wrote {file}" for file in files)]
    return Outcome(result=result, text="\n".join(text))


def _draw(args: argparse.Namespace, report: Report) -> list[str]:
    """The figures, if a folder for them is given; returns the files."""
    if args.output is None:
        return []
    from ptq4vm.inspection.figures import draw
    from ptq4vm.inspection.page import write_page

    with _stage("draw", {}):
        folder, images = Path(args.output), f"{args.images} of {args.data_dir}, {args.split} split"
        report = dataclasses.replace(report, facts={**report.facts, "images": images})
        page = write_page(report, folder / "report.html")
        return [str(path) for path in (page, *draw(report, folder, args.pictures))]


def _images(model: nn.Module, args: argparse.Namespace) -> list[Tensor]:
    """Few at a time: more are not faster, and take memory."""
    from ptq4vm.data import calibration_batches

    return calibration_batches(_dataset(args.data_dir, args.split, model), args.images, 8, 0)


def _contents(quantized: GraphModule) -> dict[str, Any]:
    from ptq4vm.record import record_of
    from ptq4vm.report import linear_rows, model_bytes

    record = record_of(quantized)
    return {
        "architecture": record.architecture,
        "input_shapes": [list(shape) for shape in record.input_shapes],
        "config": record.config.to_dict(),
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

    shown = [key for key in rows[0] if key not in said or len({row[key] for row in rows}) > 1]
    return {key: COLUMNS.get(key, key.replace("_", " ")) for key in shown}


def export(args: argparse.Namespace) -> Outcome:
    """Compile a quantized model into a package that runs without Python code of this package."""
    from ptq4vm import backend, native
    from ptq4vm.report import mebibytes

    if not _is_saved(args.model):
        raise ValueError(f"{args.model} is not the folder of a quantized model; 'ptq4vm quantize' makes one")
    import ptq4vm

    path = backend.package(ptq4vm.load(args.model), args.output)
    size = path.stat().st_size
    result = {"output": str(path), "bytes": size, "library": str(native.LIBRARY)}
    lines = [
        f"saved in {path} ({mebibytes(size)}); to run it, without importing ptq4vm:",
        f"  torch.ops.load_library({str(native.LIBRARY)!r})",
        f"  model = torch._inductor.aoti_load_package({str(path)!r})",
    ]
    return Outcome(result=result, text="\n".join(lines))


def doctor(args: argparse.Namespace) -> Outcome:
    """What is installed, which kernels run, and whether they compute what they should."""
    from ptq4vm.doctor import diagnose, wrong_bits

    wrong = wrong_bits()
    verdict = f"quantize and linear are wrong at {wrong} bits" if wrong else "ok"
    result = diagnose() | {"self_check": verdict}
    lines = [f"{package} {number or 'is missing'}" for package, number in result["versions"].items()]
    lines += [f"{key}: {result['machine'][key]}" for key in ("platform", "cpu_capability", "threads")]
    lines += [f"CUDA: {'available' if result['cuda'] else 'not available'}"]
    problem = result["native"]["problem"]
    lines += [f"native kernels: {'none, ' + problem if problem else result['native']['isa']}"]
    lines += [f"{name}: {implementation}" for name, implementation in result["operators"].items()]
    lines += [f"self-check against int64: {verdict}"]
    return Outcome(result=result, text="\n".join(lines), code=1 if wrong else 0)


def _config(text: str, seed: int) -> QuantConfig:
    """A preset by name, or a JSON file, which has its own seed."""
    from ptq4vm.config import RECIPES, QuantConfig

    if text in ("w8a8", "w6a6", "w4a4"):
        preset: Callable[..., QuantConfig] = getattr(QuantConfig, text)
        return preset(seed=seed)
    if (match := re.fullmatch(r"(.+?)(\d)", text)) and match[1] in RECIPES:
        return QuantConfig.recipe(match[1], int(match[2]), seed=seed)
    if not text.endswith(".json"):
        raise ValueError(f"{text!r} is no config: give {PRESETS}, or a .json file")
    try:
        return QuantConfig.from_json(Path(text).read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{text}: {error}") from error


def _is_saved(name: str) -> bool:
    from ptq4vm.checkpoint import CONFIG

    return (Path(name) / CONFIG).exists()


def _check_ema(args: argparse.Namespace) -> None:
    if args.ema and args.checkpoint in (None, RANDOM):
        raise ValueError("--ema takes the averaged weights of a file: give --checkpoint FILE with it")


def _model(name: str, checkpoint: str | None, ema: bool = False) -> nn.Module:
    """A quantized model from its folder, or a floating-point one by its name in timm."""
    if not _is_saved(name):
        return _named_model(name, checkpoint, ema)

    import ptq4vm
    from ptq4vm.record import record_of

    quantized = ptq4vm.load(name)
    architecture = record_of(quantized).architecture
    assert architecture is not None  # else `load` could not have built the model
    # as timm's own models say it
    quantized.pretrained_cfg = architecture["preprocessing"]
    quantized.num_classes = architecture["arguments"].get("num_classes", 0)  # a backbone has none
    return quantized


def _named_model(name: str, checkpoint: str | None, ema: bool) -> nn.Module:
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
    model = timm.create_model(name, pretrained=checkpoint is None, **options).eval()
    if checkpoint not in (None, RANDOM):
        load_checkpoint(model, checkpoint, ema=ema)
    return model


def _options(name: str, checkpoint: str, ema: bool) -> dict[str, Any]:
    """The number of classes and the size of images that a file has weights for, where they are not the name's."""
    from ptq4vm.inspection.contents import from_command_line
    from ptq4vm.models.checkpoints import read_checkpoint
    from ptq4vm.models.recognize import match, registered

    if name.partition(".")[0] not in registered():
        return {}
    found = match(name, read_checkpoint(checkpoint, ema=ema))
    if not found.arguments or not from_command_line(found):
        return {}
    print(f"{found}, as {checkpoint} has it …", file=sys.stderr)
    size = found.arguments.get("img_size")
    return {**found.arguments} | ({"pretrained_cfg_overlay": {"input_size": (3, size, size)}} if size else {})


def _both(name: str) -> tuple[nn.Module, GraphModule]:
    """A model in floating point, with random weights, and quantized: its folder's, or W8A8 with scales from noise."""
    import timm
    import torch

    import ptq4vm
    from ptq4vm.config import RangeSearch
    from ptq4vm.record import record_of

    with _stage("load", {}):
        torch.manual_seed(0)
        if _is_saved(name):
            quantized = ptq4vm.load(name)
            architecture = record_of(quantized).architecture
            assert architecture is not None
            return timm.create_model(architecture["name"], **architecture["arguments"]).eval(), quantized
        model = _named_model(name, RANDOM, False)
    with _stage("quantize", {}):
        noise = torch.randn(2, *_input_shape(model))
        config = ptq4vm.QuantConfig(range_search=RangeSearch.MINMAX)
        return model, ptq4vm.quantize(model, [noise], config, progress=False)


def _input_shape(model: nn.Module) -> tuple[int, ...]:
    from timm.data import resolve_model_data_config

    return tuple(resolve_model_data_config(model)["input_size"])


def _dataset(source: str, split: str, model: nn.Module) -> ImageDataset:
    from ptq4vm.data import open_dataset, transform_for

    classes: Any = getattr(model, "num_classes", 1000)
    return open_dataset(source, split, transform_for(model), num_classes=classes)


def _loader(model: nn.Module, args: argparse.Namespace) -> Any:
    """Batches of the split; a limit takes images from all over it, since folders are sorted by class."""
    from torch.utils.data import Subset

    from ptq4vm.data import loader

    dataset: Any = _dataset(args.data_dir, args.split, model)
    if args.limit is not None and args.limit < len(dataset):
        dataset = Subset(dataset, [i * len(dataset) // args.limit for i in range(args.limit)])
    return loader(dataset, args.batch_size)


@contextlib.contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"{name} …", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _peak_memory() -> int | None:
    """The most bytes this process has held in memory, where the system counts them."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _losses(blocks: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the losses of learning; nothing where nothing was learned."""
    from ptq4vm.report import table

    rows = [block for block in blocks if "loss_after" in block]
    columns = {"block": "block", "loss_before": "loss before", "loss_after": "loss after"}
    return [table(rows, columns)] if rows else []


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or isinstance(action.default, list)
        return action.help if silent else super()._get_help_string(action)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ptq4vm", description="Post-training quantization of Visual Mamba.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ptq4vm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], Outcome]) -> argparse.ArgumentParser:
        text = command.__doc__
        made = commands.add_parser(
            command.__name__, help=text, description=text, formatter_class=_Help, allow_abbrev=False
        )
        made.set_defaults(command=command)
        made.add_argument("--json", action="store_true", help="print one JSON object")
        return made

    either = "folder of a quantized model, or a timm name"
    data = "digits (part of scikit-learn), or a folder DIR/<split>/<class>/*"
    weights = f"file of weights, or '{RANDOM}'; else the weights timm knows of"
    averaged = "take the averaged weights of the file"

    made = add(quantize)
    made.add_argument("model", metavar="MODEL", help="timm name, such as vim_tiny_patch16_224")
    made.add_argument("--data-dir", required=True, metavar="DIR", help=data)
    made.add_argument("--output", required=True, metavar="DIR", help="folder to save the quantized model in")
    made.add_argument("--checkpoint", metavar="FILE", help=weights)
    made.add_argument("--ema", action="store_true", help=averaged)
    made.add_argument("--config", default="w8a8", help=f"{PRESETS}, or a .json file")
    made.add_argument("--images", type=_count, default=256, metavar="N", help="images to calibrate with")
    made.add_argument("--batch-size", type=_count, default=32, metavar="N", help="images read at once")
    made.add_argument("--seed", type=int, default=0, help="chooses the images, and their order in a preset's learning")
    made.add_argument("--resume-dir", metavar="DIR", help="keep finished blocks here, and continue from them")

    made = add(evaluate)
    made.add_argument("model", metavar="MODEL", help=either)
    made.add_argument("--data-dir", required=True, metavar="DIR", help=data)
    made.add_argument("--checkpoint", metavar="FILE", help=f"for models given by name: {weights}")
    made.add_argument("--ema", action="store_true", help=averaged)
    made.add_argument("--split", default="test", help="train, or one of test, val, validation")
    made.add_argument("--batch-size", type=_count, default=64, metavar="N", help="images at once")
    made.add_argument("--limit", type=_count, metavar="N", help="take only N images, spread over the split")
    made.add_argument("--against", metavar="MODEL", help="count the images on which both models say the same")

    made = add(benchmark)
    made.add_argument("model", metavar="MODEL", help=f"{either}, whose model is quantized to W8A8 on noise")
    made.add_argument("--kind", default="quantized", help=f"how MODEL runs: {KINDS}")
    made.add_argument("--against", nargs="+", default=[], metavar="KIND", help="compare with these, or saved folders")
    made.add_argument("--batch-size", type=_count, nargs="+", default=[8], metavar="N", help="images at once; else 8")
    made.add_argument("--threads", type=_count, nargs="+", default=[1], metavar="N", help="CPU threads; else 1")
    made.add_argument("--repeats", type=_count, default=20, metavar="N", help="rounds to time, after 3 to warm up")
    made.add_argument("--layers", action="store_true", help="time each operator, in FP32 and quantized")
    made.add_argument("--memory", action="store_true", help="measure what a forward adds to a fresh process")
    made.add_argument("--csv", metavar="FILE", help="write the timings here, under the names of timm's columns")
    made.add_argument("--picture", metavar="FILE", help="draw here where the time goes (.png, .svg or .pdf)")

    made = add(inspect)
    made.add_argument("path", metavar="PATH", help="folder of a quantized model, a file of weights, or a timm name")
    made.add_argument("--graph", action="store_true", help="what torch.compile(…, backend='ptq4vm') fuses, and leaves")
    made.add_argument("--data-dir", metavar="DIR", help=f"measure each linear on images: {data}")
    made.add_argument("--split", default="test", help="train, or one of test, val, validation")
    made.add_argument("--images", type=_count, default=32, metavar="N", help="images to measure with")
    made.add_argument("--against", metavar="NAME", help="the model before quantization, to compare outputs with")
    made.add_argument("--checkpoint", metavar="FILE", help=f"for the model given by name: {weights}")
    made.add_argument("--ema", action="store_true", help=averaged)
    made.add_argument("--output", metavar="DIR", help="folder for report.html and pictures of the linears' inputs")
    made.add_argument("--pictures", type=_count, default=4, metavar="N", help="linears to draw as PNG, the worst first")

    made = add(export)
    made.add_argument("model", metavar="FOLDER", help="a quantized model")
    made.add_argument("output", metavar="FILE.pt2", help="where to write the package")

    add(doctor)
    return parser
