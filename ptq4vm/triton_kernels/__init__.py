"""Kernels in Triton, for NVIDIA GPUs that the native CUDA library was not built for.

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

from ptq4vm import native

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
"""Where each operator is."""

OLDEST = (8, 0)
"""The compute capability that Triton needs."""


@functools.cache
def problem() -> str | None:
    """Why CUDA tensors do not come here, or None. Does not initialize CUDA."""
    if os.environ.get("PTQ4VM_ISA") == "reference":
        return "PTQ4VM_ISA=reference asks for none"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if native.cuda_problem() is None:
        return "the native library has kernels for GPUs"
    return "Triton is not installed" if find_spec("triton") is None else None


def operator(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of CUDA tensors, and `otherwise` on GPUs that are too old."""

    def operator(x: Tensor, *arguments: Any) -> Any:
        too_old = torch.cuda.get_device_capability(x.device) < OLDEST
        return otherwise(x, *arguments) if too_old else run(name, x, *arguments)

    return operator


def run(name: str, x: Tensor, *arguments: Any) -> Any:
    """The kernel, on x's device and the stream that is current there."""
    module = import_module(f"{__name__}.{MODULES[name]}")
    with torch.cuda.device_of(x):
        return getattr(module, name)(x, *arguments)
