"""Compile a quantized model into a package that runs without Python code of this package."""

import argparse
from pathlib import Path

from ptq4vm.cli import sources
from ptq4vm.cli.destinations import check_file
from ptq4vm.cli.render import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="a quantized model, or its hf-hub:ORG/NAME")
    parser.add_argument("output", metavar="FILE.pt2", help="where to write the package")


def run(args: argparse.Namespace) -> Outcome:
    import ptq4vm
    from ptq4vm.backend import aot, native
    from ptq4vm.formatting import mebibytes

    sources.check_model_folder(args.model)
    if Path(args.output).suffix != ".pt2":
        raise ValueError(f"{args.output}: the name of an AOTInductor package ends in .pt2")
    check_file(args.output)
    if problem := native.unavailable_reason():
        raise ValueError(f"a package runs on the native library alone, and there is none: {problem}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    path = aot.package(ptq4vm.load(args.model), args.output)
    size = path.stat().st_size
    lines = [
        f"saved in {path} ({mebibytes(size)}); to run it, without importing ptq4vm:",
        f"  torch.ops.load_library({str(native.LIBRARY)!r})",
        f"  model = torch._inductor.aoti_load_package({str(path)!r})",
    ]
    return Outcome({"output": str(path), "bytes": size, "library": str(native.LIBRARY)}, lines)
