"""The linears of csrc/cuda need the headers of CUTLASS and of a CUDA toolkit: where those are, and how to call linears.

CUTLASS is the folder that PTQ4VM_CUTLASS_DIR names, else that of an installed nvidia-cutlass; `include` is in it.
"""

import ctypes
import importlib.util
import mmap
import os
import shutil
from pathlib import Path

import pytest
import torch
from emulated.cuda_emulator import Library, QParams, Struct, boolean, int32, int64, pointer
from torch import Tensor


def cutlass_headers() -> Path | None:
    places = []
    if "PTQ4VM_CUTLASS_DIR" in os.environ:
        places.append(Path(os.environ["PTQ4VM_CUTLASS_DIR"]))
    spec = importlib.util.find_spec("cutlass_library")  # without importing it, which takes scipy and more
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "source")
    found = (place / "include" for place in places)
    return next((folder for folder in found if (folder / "cutlass" / "cutlass.h").exists()), None)


def toolkit_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    places = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places += [Path(nvcc).resolve().parents[1]] if nvcc else []
    places.append(Path("/usr/local/cuda"))
    found = (place / "include" for place in places)
    return next((folder for folder in found if (folder / "cuda_fp16.h").exists()), None)


class LinearProblem(Struct):
    _fields_ = (
        ("x", pointer),
        ("x_scale", pointer),
        ("zero_point", pointer),
        ("weight", pointer),
        ("weight_sum", pointer),
        ("weight_scale", pointer),
        ("bias", pointer),
        ("y", pointer),
        ("y_type", int32),
        ("codes", pointer),
        ("nibbles", boolean),
        ("codes_row", int64),
        ("qparams", QParams),
        ("directions", int64),
        ("rows", int64),
        ("scales", int64),
        ("channels", int64),
        ("features", int64),
    )


def host_flags() -> tuple[str, ...]:
    """Options of g++, for emulated kernels that include CUTLASS."""
    cutlass, toolkit = cutlass_headers(), toolkit_headers()
    if cutlass is None:
        pytest.skip("no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0")
    if toolkit is None:
        pytest.skip("no CUDA headers: set CUDA_HOME")
    folders = (cutlass, toolkit, toolkit / "cccl")
    defined = "-DPTQ4VM_TOOLKIT_TYPES", "-DCUTLASS_SM90_COLLECTIVE_BUILDER_SUPPORTED"  # CUTLASS finds no nvcc
    return *defined, "-fpermissive", *(f for folder in folders for f in ("-isystem", str(folder)))


def guarded(x: Tensor, offset: int = 0) -> Tensor:
    """A copy of x; who goes further than `offset` elements behind it ends the process."""
    page, before = mmap.PAGESIZE, offset * x.element_size()
    size = x.numel() * x.element_size()
    memory = mmap.mmap(-1, -(-(size + before) // page) * page + page)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + len(memory) - page), page, 0) == 0
    if size == 0:
        return x.clone()
    start = len(memory) - page - before - size
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape).copy_(x)


def run(library: Library, operator: str, problem: LinearProblem) -> bool:
    function = library._library[f"_ZN6ptq4vm4cuda{len(operator)}{operator}ERKNS0_13LinearProblemEPv"]
    function.restype = ctypes.c_bool
    return function(ctypes.byref(problem), None)
