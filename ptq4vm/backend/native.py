"""The native kernels: where their libraries are, one for CPUs and one for GPUs, and that they are used.

`PTQ4VM_ISA` names the best instruction set to use (portable, avx2, vnni, amx), or `reference` to leave the
libraries alone and compute everything with the PyTorch reference operators.
"""

import functools
import os
import re
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_C_cpu.so"
CUDA_LIBRARY = Path(__file__).parents[1] / "_C_cuda.so"


@functools.cache
def unavailable_reason() -> str | None:
    """Loads the library once; None, or why there are no native kernels."""
    return _load(LIBRARY, "ptq4vm was installed without a C++ compiler")


@functools.cache
def cuda_unavailable_reason() -> str | None:
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
        reason = f"{library.name} does not load: {error}"
        if library is LIBRARY:  # that for GPUs may lack a driver
            warnings.warn(f"{reason}; install ptq4vm again, which builds it", RuntimeWarning, stacklevel=2)
        return reason
    return None


def cuda_architectures() -> tuple[str, ...]:
    """Returns the architectures of the library for GPUs, as TORCH_CUDA_ARCH_LIST named them; none without a library."""
    return () if cuda_unavailable_reason() else tuple(torch.ops.ptq4vm._cuda_architectures().split())


def supports(device: torch.device | int) -> bool:
    """Returns whether the library for GPUs has code for this one. Initializes CUDA where there is a library."""
    return cuda_unavailable_reason() is None and has_code_for(torch.cuda.get_device_capability(device))


def has_code_for(capability: tuple[int, int]) -> bool:
    """Code for x.y runs on x.z from z = y on, with an "a" on x.y alone; PTX also on every x that is larger."""
    for architecture in cuda_architectures():
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
        assert match, architecture
        own = int(match[1]), int(match[2])
        later = capability > own and match[3] != "a"
        if capability == own or (later and (capability[0] == own[0] or (match[4] and not match[3]))):
            return True
    return False


@functools.cache
def warn_of_gpu(capability: tuple[int, int]) -> None:
    """Says once who serves GPUs that the library has no code for, and the way out."""
    number = ".".join(map(str, capability))
    warnings.warn(
        f"the native kernels for GPUs were built for compute capability {', '.join(cuda_architectures())}, and a GPU "
        f"here has {number}: kernels in Triton and the slow PyTorch reference operators serve it. Install ptq4vm "
        f"again with PTQ4VM_CUDA=1 and {number} in TORCH_CUDA_ARCH_LIST",
        RuntimeWarning,
        stacklevel=3,
    )


def isa() -> str:
    """The instruction set in use; `reference` without native kernels."""
    return "reference" if unavailable_reason() else torch.ops.ptq4vm._use_isa("")


@functools.cache
def warn() -> None:
    """Says once that the reference operators run, and the way out."""
    if os.environ.get("PTQ4VM_ISA") != "reference":
        warnings.warn(
            f"quantized models run on the slow PyTorch reference operators: {unavailable_reason()}. Install a "
            "C++ compiler (GCC or Clang), then ptq4vm again (`pip install --force-reinstall --no-deps`); "
            "PTQ4VM_ISA=reference silences this",
            RuntimeWarning,
            stacklevel=3,
        )
