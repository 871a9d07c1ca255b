"""CUDA kernels on the CPU: g++ compiles csrc/cuda/NAME.cu with the headers of `include`,
and tests call what launch.h has.

    def test_codes(emulated):                       # a fixture of conftest.py
        library = emulated("quantize")              # compiled once in a session; skips where there is no g++
        library.run(Quantize(x=x, x_type=kind(x), …, codes=codes, rows=3, channels=8))

A `Struct` mirrors one of csrc/operators.h: fields in its order. Tensors and structs are given as they are.
`poisoned` makes outputs, so that what a kernel leaves out shows. `emulated("rotate", change=("rotate.cuh",
"__syncwarp()", ""))` compiles a wrong kernel: a copy with that text replaced, which must be there once. `is_caught`
says whether a check fails with it, by an exception or because the emulator aborts.
"""

import ctypes
import fcntl
import hashlib
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck
from torch import Tensor

from ptq4vm.ops import rotation

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
HEADERS = Path(__file__).parent / "include"
COMPILER = shutil.which("g++")
FLAGS = ("-x", "c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off")
# Uninitialised variables hold a pattern; two libraries in a process share no symbol.
FLAGS += ("-ftrivial-auto-var-init=pattern", "-fno-gnu-unique", "-fPIC", "-shared")

pointer, int64, int32, float32, boolean = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
    ctypes.c_bool,
)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SUPPRESSED = [HealthCheck.function_scoped_fixture]  # `emulated` is one for the session


class Struct(ctypes.Structure):
    """Its class has the name of the C++ struct, and `_fields_` as there."""

    def __init__(self, **values):
        self.keep = list(values.values())  # memory that C++ sees lives as long as this
        super().__init__(**{name: self._field(name, value) for name, value in values.items()})

    def _field(self, name: str, value: object) -> object:
        if isinstance(value, Tensor):
            return value.data_ptr()
        by_address = isinstance(value, Struct) and dict(self._fields_)[name] is pointer
        return ctypes.addressof(value) if by_address else value


class QParams(Struct):
    _fields_ = (
        ("inv_scale", pointer),
        ("zero_point", pointer),
        ("inv_smooth", pointer),
        ("scales", int64),
        ("low", int32),
        ("high", int32),
    )


def qparams_struct(
    inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int, sets: int = 1
) -> QParams:
    half = 2 ** (bits - 1)
    return QParams(
        inv_scale=inv_scale.contiguous(),
        zero_point=zero_point.contiguous(),
        inv_smooth=inv_smooth,
        scales=max(1, inv_scale.numel() // max(1, sets)),
        low=-half,
        high=half - 1,
    )


def kind(x: Tensor) -> int:
    """The `Float` of operators.h."""
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[x.dtype]


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min + 77, dtype=dtype)


def offset_by(elements: int, x: Tensor) -> Tensor:
    """x, `elements` after an address that is a multiple of 16 elements."""
    memory = torch.empty(x.numel() + 32, dtype=x.dtype)
    start = -(memory.data_ptr() // x.element_size()) % 16 + elements
    return memory[start : start + x.numel()].view(x.shape).copy_(x)


class Rows(Struct):
    _fields_ = (("data", pointer), ("type", int32), ("image", int64), ("row", int64))


def rows_of(x: Tensor | None) -> Rows:
    """x (…, B, L, channels) where it lies."""
    return Rows() if x is None else Rows(data=x, type=kind(x), image=x.stride(-3), row=x.stride(-2))


class Rotation(Struct):
    _fields_ = (("matrix", pointer), ("channels", int64), ("order", int64), ("factor", float32))

    @classmethod
    def of(cls, channels):
        """A rotation of so many channels, as the bindings make it."""
        order = channels & -channels
        size = channels // order
        matrix = rotation.hartley(size) if 1 < size <= rotation.LARGEST_HARTLEY else None
        return cls(matrix=matrix, channels=channels, order=order, factor=1 / math.sqrt(order))


class Library:
    """The operators of one .cu file: library.run(struct)."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.launches = self._library.ptq4vm_launches

    def run(self, arguments: Struct) -> None:
        name = type(arguments).__name__
        getattr(self._library, f"_ZN6ptq4vm4cuda3runERKNS_{len(name)}{name}EPv")(ctypes.byref(arguments), None)


Change = tuple[str, str, str]
"""A file of csrc/cuda, a text in it, and what stands there instead."""


def compile_emulated(folder: Path, name: str, change: Change | None = None, flags: tuple[str, ...] = ()) -> Library:
    """csrc/cuda/NAME.cu compiled into `folder`, which workers of a session share."""
    mutant = f"{name}.{hashlib.sha256(repr(change).encode()).hexdigest()[:16]}" if change else name
    target = folder / f"{mutant}.so"
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            sources = _changed(folder / mutant, change) if change else SOURCES
            warnings = "-w" if change else "-Werror"  # what is missing leaves something unused
            command = [COMPILER, *FLAGS, warnings, f"-I{HEADERS}", *flags]
            command += [str(sources / f"{name}.cu"), "-o", f"{target}.part"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.rename(f"{target}.part", target)
    return Library(target)


def _changed(folder: Path, change: Change) -> Path:
    """The sources with a change, in `folder`."""
    shutil.copytree(SOURCES, folder / "cuda", dirs_exist_ok=True)
    for name in ("layout.h", "operators.def", "operators.h"):
        shutil.copy(SOURCES.parent / name, folder)
    file, old, new = change
    text = (folder / "cuda" / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    (folder / "cuda" / file).write_text(text.replace(old, new))
    return folder / "cuda"


def is_caught(check: Callable[[], None]) -> bool:
    """Whether `check` raises, or ends its process: it runs in a child of this one."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            check()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0
