"""The native kernels: where their library is, and that it is used.

`PTQ4VM_ISA` names the best instruction set to use (portable, avx2, vnni, amx), or `reference` to leave the library
alone and compute everything with the PyTorch reference operators.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_C_cpu.so"


@functools.cache
def problem() -> str | None:
    """Loads the library once; None, or why there are no native kernels."""
    if os.environ.get("PTQ4VM_ISA") == "reference":
        return "PTQ4VM_ISA=reference asks for none"
    if not LIBRARY.exists():
        return "ptq4vm was installed without a C++ compiler"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
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
