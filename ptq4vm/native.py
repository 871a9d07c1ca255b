"""The native kernels: where their libraries are, one for CPUs and one for GPUs, and that they are used.

`PTQ4VM_ISA` names the best instruction set to use (portable, avx2, vnni, amx), or `reference` to leave the
libraries alone and compute everything with the PyTorch reference operators.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_C_cpu.so"
CUDA_LIBRARY = Path(__file__).parent / "_C_cuda.so"


@functools.cache
def problem() -> str | None:
    """Loads the library once; None, or why there are no native kernels."""
    return _load(LIBRARY, "ptq4vm was installed without a C++ compiler")


@functools.cache
def cuda_problem() -> str | None:
    """Loads the library for GPUs once, which needs none; None, or why there are no kernels for them."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return _load(CUDA_LIBRARY, "ptq4vm was installed without PTQ4VM_CUDA=1")


def _load(library: Path, missing: str) -> str | None:
    if os.environ.get("PTQ4VM_ISA") == "reference":
        return "PTQ4VM_ISA=reference asks for none"
    if not library.exists():
        return missing
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def isa() -> str:
    """The instruction set in use; `reference` without native kernels."""
    return "reference" if problem() else torch.ops.ptq4vm._use_isa("")


@functools.cache
def warn() -> None:
    """Says once that the reference operators run, and the way out."""
    if os.environ.get("PTQ4VM_ISA") != "reference":
        warnings.warn(
            f"quantized models run on the slow PyTorch reference operators: {problem()}. Install a C++ compiler "
            "(GCC or Clang), then ptq4vm again (`pip install --force-reinstall --no-deps`); PTQ4VM_ISA=reference "
            "silences this",
            RuntimeWarning,
            stacklevel=3,
        )
