"""The CUDA library without a GPU: its glue, compiled with g++ and linked to the emulated kernels of cuda_emulator.py.

Its operators are called `ptq4vm_emulated::` and take tensors of the CPU.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cuda_cutlass import host_flags
from cuda_emulator import COMPILER, SOURCES, compile_emulated

from ptq4vm import ops

NAMESPACE = "ptq4vm_emulated"
GLUE = ("../ops_producers.cpp", "../ops_scan.cpp", "run.cpp", "ops_linear.cpp", "linear.cpp", "emulator/toolkit.cpp")
KERNELS = ("quantize", "norm", "rotate", "conv", "conv2d", "scan", "directional_scan", "layout")
LINEARS = ("linear_s8", "linear_s4")
DEFINES = (f"-DPTQ4VM_LIBRARY={NAMESPACE}", "-DPTQ4VM_KEY=CPU", "-DPTQ4VM_CUDA")
DEFINES += ("-DTORCH_TARGET_VERSION=0x020b000000000000",)


class Emulated:
    """Operators by name; `Emulated(folder)` compiles and registers them, once in a process."""

    def __init__(self, folder: Path) -> None:
        flags = host_flags()
        libraries = [compile_emulated(folder, name) for name in KERNELS]
        libraries += [compile_emulated(folder, name, flags=flags) for name in LINEARS]
        target = folder / f"glue.{os.getpid()}.so"
        headers = Path(torch.__file__).parent / "include"
        command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *DEFINES]
        command += ["-isystem", str(headers), *(str(SOURCES / name) for name in GLUE)]
        command += [str(folder / f"{name}.so") for name in (*KERNELS, *LINEARS)]
        command += [f"-L{headers.parent / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self._kept = libraries, torch.library.Library(NAMESPACE, "DEF")
        for schema in ops.SCHEMAS:
            self._kept[1].define(schema)
        torch.ops.load_library(str(target))
        self._library = ctypes.CDLL(str(target))

    def __getattr__(self, name: str):
        return getattr(getattr(torch.ops, NAMESPACE), name)

    @contextmanager
    def on(self, capability: int = 80, stream: int = 0) -> Iterator[None]:
        """What the operators take the GPU for, and the stream that is current."""
        self._library.ptq4vm_emulate(capability, ctypes.c_void_p(stream))
        try:
            yield
        finally:
            self._library.ptq4vm_emulate(80, None)

    def launches(self) -> list[int]:
        """The streams of all kernels since the last call."""
        found: list[int] = []
        for library in self._kept[0]:
            streams = (ctypes.c_void_p * 4096)()
            count = library.launches(streams, len(streams))
            assert count <= len(streams)
            found += [stream or 0 for stream in streams[:count]]
        return found
