"""Kernels in Triton, for NVIDIA GPUs that no native library was built for.

They equal the reference as all kernels do: codes and accumulators always, fused operators but for rounding ties. An
operator without one here (the scans, which have no form in Triton, the rotations, all gradients) runs the reference on
CUDA tensors. Triton is loaded when the first of these kernels is called.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MODULES = {
    "quantize": "quantize",
    "norm_quantize": "norm",
    "causal_conv1d": "conv",
    "conv1d_quantize": "conv",
    "conv2d_quantize": "conv",
    "linear": "linear",
    "linear_packed": "linear",
    "linear_gelu_quantize": "linear",
}
"""The module of each operator."""

OLDEST = (8, 0)
"""The compute capability that Triton needs."""


@functools.cache
def unavailable_reason() -> str | None:
    """Why there are no kernels in Triton, or None. Does not initialize CUDA."""
    if os.environ.get("PTQ4VM_ISA") == "reference":
        return "PTQ4VM_ISA=reference asks for none"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return "Triton is not installed" if find_spec("triton") is None else None


def supports(name: str, device: torch.device | int) -> bool:
    """Returns whether an operator has a kernel for this GPU."""
    return name in MODULES and unavailable_reason() is None and torch.cuda.get_device_capability(device) >= OLDEST


def operator(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of CUDA tensors; `otherwise` itself where it has no kernel."""
    if name not in MODULES or unavailable_reason() is not None:
        return otherwise

    def operator(x: Tensor, *arguments: Any) -> Any:
        return run(name, x, *arguments) if supports(name, x.device) else otherwise(x, *arguments)

    return operator


def run(name: str, x: Tensor, *arguments: Any) -> Any:
    """The kernel, on x's device and the stream that is current there."""
    module = import_module(f"{__name__}.{MODULES[name]}")
    with torch.cuda.device_of(x):
        return getattr(module, name)(x, *arguments)
