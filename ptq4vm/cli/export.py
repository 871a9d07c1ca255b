"""Write a quantized model as a file that runs without this package: ONNX, or a compiled package (.pt2)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ptq4vm.cli import sources
from ptq4vm.cli.destinations import check_file
from ptq4vm.cli.render import Outcome, stage

if TYPE_CHECKING:
    from torch.fx import GraphModule

RUNTIMES = ("portable", "onnxruntime", "tensorrt", "custom")
"""Those of `ptq4vm.onnx.export`, which would import PyTorch for a help text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="a quantized model, or its hf-hub:ORG/NAME")
    parser.add_argument("output", metavar="FILE", help="where to write: the suffix decides between .onnx and .pt2")
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help="what runs an ONNX file: any runtime (portable, the default), the exact integer products of ONNX Runtime, "
        "TensorRT, or ONNX Runtime with this package's library of operators (custom), as fast as the fused model",
    )


def run(args: argparse.Namespace) -> Outcome:
    write = {".onnx": _onnx, ".pt2": _package}.get(Path(args.output).suffix)
    if write is None:
        raise ValueError(f"{args.output}: the name of an ONNX file ends in .onnx, of a compiled package in .pt2")
    if args.runtime and write is _package:
        raise ValueError(
            f"--runtime is of ONNX files: leave it out, or give a name that ends in .onnx, not {args.output}"
        )
    sources.check_model_folder(args.model)
    check_file(args.output)
    return write(args)


def _loaded(args: argparse.Namespace) -> GraphModule:
    import ptq4vm

    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with stage("load"):
        return ptq4vm.load(args.model)


def _onnx(args: argparse.Namespace) -> Outcome:
    import ptq4vm.onnx

    runtime = args.runtime or "portable"
    library = {"library": str(ptq4vm.onnx.library())} if runtime == "custom" else {}
    quantized = _loaded(args)
    with stage("export"):
        path = ptq4vm.onnx.export(quantized, args.output, runtime)
    outcome, lines = _saved(path)
    if library:
        lines += ["to run it, in ONNX Runtime:", f"  options.register_custom_ops_library({library['library']!r})"]
    return Outcome(outcome | {"runtime": runtime} | library, lines)


def _package(args: argparse.Namespace) -> Outcome:
    from ptq4vm.backend import aot, native

    if problem := native.unavailable_reason():
        raise ValueError(f"a package runs on the native library alone, and there is none: {problem}")
    path = aot.package(_loaded(args), args.output)
    outcome, lines = _saved(path)
    lines[0] += "; to run it, without importing ptq4vm:"
    lines += [
        f"  torch.ops.load_library({str(native.LIBRARY)!r})",
        f"  model = torch._inductor.aoti_load_package({str(path)!r})",
    ]
    return Outcome(outcome | {"library": str(native.LIBRARY)}, lines)


def _saved(path: Path) -> tuple[dict[str, object], list[str]]:
    from ptq4vm.formatting import mebibytes

    size = path.stat().st_size
    return {"output": str(path), "bytes": size}, [f"saved in {path} ({mebibytes(size)})"]
