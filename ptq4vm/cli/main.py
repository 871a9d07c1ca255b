"""The command line: quantize, evaluate, benchmark, inspect, export, doctor.

A command returns what it found as a dictionary and as text; `main` prints one of the two. Whatever is printed on the
way goes to standard error. What a command needs is imported inside it, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ptq4vm import __version__
from ptq4vm.cli import inspect as cli_inspect
from ptq4vm.cli.endings import INTERRUPTED, TERMINATED, Terminated, interrupted_text, message_of, terminable
from ptq4vm.cli.sources import (
    RANDOM,
    check_ema,
    dataset_for,
    is_saved,
    loader_for,
    named_model,
    open_both,
    open_model,
    say,
    stage,
)
from ptq4vm.recipes import PRESETS, RECIPES, parse
from ptq4vm.text import escaped

if TYPE_CHECKING:
    from ptq4vm.config import QuantConfig

KINDS = (
    "quantized, fused, compiled, compiled-half, eager-fp32; in a checkout eager-loop, compiled-fp32, compiled-bf16, "
    "torchao-int8, onnxruntime-int8, openvino-int8"
)
CONFIGS = f"{', '.join(PRESETS)}, or a recipe with its bits, such as best4"
LARGEST = 2**31 - 1
"""Of a count on the command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command found, for programs and for people."""

    result: dict[str, Any]
    text: str
    code: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; wrong usage exits with 2 as argparse does."""
    _prepare_streams()
    args = _parser().parse_args(argv)
    try:
        with terminable(), contextlib.redirect_stdout(sys.stderr):
            outcome = args.command(args)
    except KeyboardInterrupt as stop:
        _complain(interrupted_text(args))
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except Exception as error:
        message = message_of(error, args)
        if message is None:
            raise
        _complain(f"error: {message}")
        return 1
    return _show(outcome, args.json)


def _prepare_streams() -> None:
    """Printing never fails for a character, nor for the lack of a standard error."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        say(f"ptq4vm: {text}")


def _show(outcome: Outcome, as_json: bool) -> int:
    """Prints the result and returns the exit code."""
    from ptq4vm.report import to_json

    text = to_json(outcome.result) if as_json else "\n".join(map(escaped, outcome.text.split("\n")))
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        print(text, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError, AttributeError):  # Python must not try to flush again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            return outcome.code
        _complain(f"error: the result cannot be written to standard output: {error}")
        return 1
    return outcome.code


def quantize(args: argparse.Namespace) -> Outcome:
    """Calibrate on images of the train split, convert, save."""
    import ptq4vm
    from ptq4vm.checkpoint import free_folder
    from ptq4vm.cli.outputs import check_apart, check_folder
    from ptq4vm.data import calibration_batches
    from ptq4vm.metadata import metadata_of
    from ptq4vm.report import mebibytes, model_bytes, table

    output, config = free_folder(args.output), _config(args.config, args.seed)  # said before the work, not after
    check_folder(output)
    if args.resume_dir is not None:
        check_apart(output, args.resume_dir)
        check_folder(args.resume_dir)
    check_ema(args)
    seconds: dict[str, float] = {}
    with stage("load", seconds):
        model = named_model(args.model, args.checkpoint, args.ema)
        dataset = dataset_for(args.data_dir, "train", model)
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
        "bytes_before": before,
        "bytes_after": after,
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "blocks": list(metadata.blocks),
    }
    lines = [
        *cli_inspect.losses(metadata.blocks),
        f"{len(metadata.linears)} linears, {mebibytes(before)} → {mebibytes(after)} ({before / after:.2f}× smaller)",
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
    if args.checkpoint is not None and all(map(is_saved, names)):
        raise ValueError(f"--checkpoint is for a model given by name; {' and '.join(names)} has its own weights")
    check_ema(args)
    models = [open_model(name, args.checkpoint, args.ema) for name in names]
    loaders = [loader_for(model, args) for model in models]
    reference = None if args.against is None else evaluation.predictions(models[1], loaders[1])
    found = evaluation.evaluate(models[0], loaders[0], reference_predictions=reference)
    result = {"model": args.model, "against": args.against, "split": args.split, **found.to_dict()}
    columns = {"model": "model", "images": "images", "top1": "top-1 %", "top5": "top-5 %"}
    if args.against is not None:
        columns |= {"agreement": f"% as {args.against}", "divergence": "KL"}
    lines = [table([result], columns | {"loss": "loss", "nonfinite": "not finite", "seconds": "seconds"})]
    if found.nonfinite:
        lines += [
            f"{found.nonfinite} of {found.images} images hold NaN or infinity in their pixels or logits: they count as "
            "wrong, and loss and KL are left out; do the weights fit the model?"
        ]
    return Outcome(result=result, text="\n".join(lines))


def benchmark(args: argparse.Namespace) -> Outcome:
    """Time a quantized model against other ways to run the same network, on random images."""
    from ptq4vm.benchmark.kinds import from_checkout
    from ptq4vm.benchmark.run import Plan, run
    from ptq4vm.cli.outputs import check_file
    from ptq4vm.metadata import metadata_of
    from ptq4vm.report import write_csv

    if args.picture is not None:
        from_checkout("picture", "--picture").check_picture(args.picture)
    for file in (args.csv, args.picture):
        if file is not None:
            check_file(file)
    kinds = (args.kind, *args.against)
    twice = [kind for kind in kinds if kinds.count(kind) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; a kind is compared with other ones")
    others: dict[str, Any] = {name: open_model(name, None) for name in args.against if is_saved(name)}
    sections = {"layers": args.layers or args.picture is not None, "memory": args.memory}
    plan = Plan(
        kinds=kinds,
        others=tuple(others),
        batch_sizes=tuple(args.batch_size),
        threads=tuple(args.threads),
        repeats=args.repeats,
        sections=tuple(name for name, asked in sections.items() if asked),
    )
    model, quantized = open_both(args.model)
    shapes = {name: metadata_of(graph).input_shapes[0] for name, graph in {args.model: quantized, **others}.items()}
    if len(set(shapes.values())) > 1:
        sizes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes.items())
        raise ValueError(f"models are compared on the same images, but these take different ones: {sizes}")
    findings = run(args.model, shapes[args.model], model, quantized, plan, others)
    if args.csv is not None:
        write_csv(args.csv, findings.rows())
    if args.picture is not None:
        layers: Any = findings.sections["layers"]
        layers.draw(args.picture, args.model)
    return Outcome(result=findings.to_dict(), text=str(findings))


def inspect(args: argparse.Namespace) -> Outcome:
    """What is in a quantized model or a file of weights; with images, what quantization did to each linear."""
    result, lines = cli_inspect.inspect(args)
    return Outcome(result=result, text="\n".join(lines))


def export(args: argparse.Namespace) -> Outcome:
    """Compile a quantized model into a package that runs without Python code of this package."""
    from ptq4vm.backend import aot, native
    from ptq4vm.cli.outputs import check_file
    from ptq4vm.report import mebibytes

    if not is_saved(args.model):
        raise ValueError(f"{args.model} is not the folder of a quantized model; 'ptq4vm quantize' makes one")
    if Path(args.output).suffix != ".pt2":
        raise ValueError(f"{args.output}: the name of an AOTInductor package ends in .pt2")
    check_file(args.output)
    if problem := native.unavailable_reason():
        raise ValueError(f"a package runs on the native library alone, and there is none: {problem}")
    import ptq4vm

    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    path = aot.package(ptq4vm.load(args.model), args.output)
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
    problem, cuda_problem = result["native"]["problem"], result["native"]["cuda_problem"]
    lines += [f"native kernels: {'none, ' + problem if problem else result['native']['isa']}"]
    built = ", ".join(result["native"]["cuda_architectures"])
    lines += [f"native kernels for GPUs: {'none, ' + cuda_problem if cuda_problem else 'for ' + built}"]
    lines += [
        f"GPU {i}: {gpu['name']}, compute capability {gpu['capability']}"
        + ("" if gpu["native"] else ", not served by native kernels")
        for i, gpu in enumerate(result["gpus"])
    ]
    lines += [f"{name}: {implementation}" for name, implementation in result["operators"].items()]
    lines += [f"self-check against int64: {verdict}"]
    return Outcome(result=result, text="\n".join(lines), code=1 if wrong else 0)


def _config(text: str, seed: int) -> QuantConfig:
    """A recipe by name, or a JSON file, which has its own seed."""
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
    """The most bytes this process has held in memory, where the system counts them."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or isinstance(action.default, list)
        return action.help if silent else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _between(low: int, high: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be at least {low} and at most {high}, got {value}")
        return value

    return count


_count, _threads, _seed = _between(1, LARGEST), _between(1, 1024), _between(-LARGEST, 2**63 - 1)


def _word(text: str) -> str:
    """Type of all that are no numbers."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("must not be empty, nor hold a null character")
    return text


class _Parser(argparse.ArgumentParser):
    """Repeats no words that a terminal would act on."""

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ptq4vm", description="Post-training quantization of Visual Mamba.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ptq4vm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], Outcome]) -> argparse.ArgumentParser:
        text = command.__doc__
        made = commands.add_parser(
            command.__name__, help=text, description=text, formatter_class=_Help, allow_abbrev=False
        )
        made.register("type", None, _word)
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
    made.add_argument("--config", default="w8a8", help=f"{CONFIGS}, or a .json file")
    listed = (f"  {recipe.name:18} {recipe.description}" for recipe in RECIPES.values())
    made.epilog = "\n".join(("recipes (w8a8, w6a6 and w4a4 are ptq4vm's):", *listed))
    made.add_argument("--images", type=_count, default=256, metavar="N", help="images to calibrate with")
    made.add_argument("--batch-size", type=_count, default=32, metavar="N", help="images read at once")
    made.add_argument(
        "--seed", type=_seed, default=0, help="chooses the images, and their order in a preset's learning"
    )
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
    made.add_argument("--threads", type=_threads, nargs="+", default=[1], metavar="N", help="CPU threads; else 1")
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
