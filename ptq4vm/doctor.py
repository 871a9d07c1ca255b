"""Reports installed versions and the implementation of each operator, and checks the operators' results."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ptq4vm import __version__, ops
from ptq4vm.backend import native
from ptq4vm.backend import triton as triton_kernels
from ptq4vm.benchmark import machine
from ptq4vm.ops import layouts

PACKAGES = ("torch", "torchao", "timm", "safetensors")
REFERENCE = "PyTorch reference"


def diagnose() -> dict[str, Any]:
    """Returns versions (None for a missing package), the machine, and the implementation of each operator."""
    names = sorted(f"ptq4vm::{schema.split('(', 1)[0]}" for schema in ops.SCHEMAS)
    return {
        "versions": {
            "ptq4vm": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "machine": machine(),
        "native": {
            "isa": native.isa(),
            "problem": native.unavailable_reason(),
            "cuda_problem": native.cuda_unavailable_reason(),
            "cuda_architectures": native.cuda_architectures(),
        },
        "cuda": torch.cuda.is_available(),
        "gpus": [_gpu(device) for device in _gpus()],
        "operators": {name: _implementation(name) for name in names},
    }


def wrong_bits() -> list[int]:
    """Returns the bits at which quantize and linear differ from int64 arithmetic, on the CPU and on a GPU if any.

    Scales are powers of two, so the results must be equal.
    """
    random = torch.Generator().manual_seed(0)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [bits for bits in (4, 8) if not all(_is_exact(bits, random, device) for device in devices)]


def _is_exact(bits: int, random: torch.Generator, device: str) -> bool:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (2, 5, 33), generator=random)
    zero_point = torch.randint(-half, half, (5,), generator=random)
    weight = torch.randint(1 - half, half, (7, 33), generator=random)
    scale, weight_scale = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0]), torch.full((7,), 0.5)
    centred = codes - zero_point[:, None]
    stored = layouts.pack_int4(weight.to(torch.int8)) if bits <= 4 else weight.to(torch.int8)
    zero = zero_point.to(torch.int32)
    inputs = (centred * scale[:, None], scale, zero, stored, weight_scale)
    x, x_scale, zero, stored, weight_scale = (tensor.to(device) for tensor in inputs)
    x_q = ops.quantize(x, 1 / x_scale, zero, None, bits)
    y = ops.linear(x_q, x_scale, zero, stored, weight_scale, None, torch.float32).cpu()
    return torch.equal(x_q.cpu().long(), codes) and torch.equal(y, (centred @ weight.t()) * scale[:, None] * 0.5)


def _gpus() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _gpu(device: int) -> dict[str, Any]:
    """Returns name and compute capability of a GPU, and whether the native library has code for it."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {"name": torch.cuda.get_device_name(device), "capability": capability, "native": native.supports(device)}


def _implementation(operator: str) -> str:
    """Returns the implementations of an operator on this machine's devices."""
    found = [f"CPU ({native.isa()})"] if _has_kernel(operator, "CPU") else []
    on_gpus = {_implementation_on_gpu(operator, device) for device in _gpus()}
    if on_gpus - {REFERENCE}:
        found.append(f"CUDA ({', '.join(sorted(on_gpus))})")
    return " and ".join(found) or REFERENCE


def _implementation_on_gpu(operator: str, device: int) -> str:
    if not _has_kernel(operator, "CUDA"):
        return REFERENCE
    if native.supports(device):
        return "native"
    return "Triton" if triton_kernels.supports(operator.removeprefix("ptq4vm::"), device) else REFERENCE


def _has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
