"""Compiles a quantized model into an AOTInductor package."""

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule

from ptq4vm.backend import native
from ptq4vm.passes.lower.pipeline import converted_graph, fusing_pipeline
from ptq4vm.serialization.recorded_values import example_inputs


def package(quantized: GraphModule, path: str | Path) -> Path:
    """Compiles a lowered model, fused, into an AOTInductor package (.pt2) for any batch.

    A process runs it with `torch._inductor.aoti_load_package(path)` after `torch.ops.load_library` of this package's
    native library, without Python code of ours; it is laid out for this machine's kernels. Takes a C++ compiler and
    about a minute. Raises ValueError where the native library is missing.
    """
    if native.unavailable_reason() is not None:
        raise ValueError(
            f"a package runs on the native library alone, and there is none: {native.unavailable_reason()}"
        )
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: the name of an AOTInductor package ends in .pt2")
    gm = converted_graph(quantized, fusing_pipeline())
    examples = example_inputs(quantized, 2)
    shapes = tuple({0: Dim("batch")} if isinstance(value, Tensor) and value.dim() else None for value in examples)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    try:
        with torch.no_grad():
            program = torch.export.export(gm, examples, dynamic_shapes=shapes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
