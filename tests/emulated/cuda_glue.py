"""The CUDA library without a GPU: its glue, compiled with g++ and linked to the emulated kernels of cuda_emulator.py.

Its operators are called `ptq4vm_emulated::` and take tensors of the CPU. `gpu.of(1)` has them for tensors of the second
GPU, as far as the library sees: their memory is the CPU's.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from emulated.cuda_cutlass import host_flags
from emulated.cuda_emulator import COMPILER, SOURCES, compile_emulated
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ptq4vm import ops

NAMESPACE = "ptq4vm_emulated"
GLUE = (*(f"../bindings/{name}.cpp" for name in ("quantize", "norm", "conv", "scan", "linear")),)
GLUE += ("run.cpp", "run_linear.cpp", "linear.cpp")
TOOLKIT = Path(__file__).parent / "toolkit.cpp"
KERNELS = ("quantize", "norm", "rotate", "conv", "conv2d", "scan", "directional_scan", "repack")
LINEARS = ("linear_s8", "linear_s4")
DEFINES = (f"-DPTQ4VM_LIBRARY={NAMESPACE}", "-DPTQ4VM_KEY=CPU", "-DPTQ4VM_CUDA")
DEFINES += ("-DTORCH_TARGET_VERSION=0x020b000000000000",)


CPU = -1
"""The index of the device of its tensors."""


def _named(x: Tensor, device: torch.device) -> Tensor:
    """x under the name of another device: the same memory, which must outlive the result."""
    storage = x.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), device, storage.nbytes())
    if device.type == "cpu":
        return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())
    shape = {"size": x.shape, "stride": x.stride(), "storage_offset": x.storage_offset(), "dtype": x.dtype}
    return torch._C._construct_CUDA_Tensor_From_Storage_And_Metadata(shape, storage)


def on_gpu(x: Tensor, device: int) -> Tensor:
    """x under the name of a GPU. Only a torch with CUDA can."""
    there = _named(x, torch.device("cuda", device))
    there.memory = x
    return there


def on_cpu(x: Tensor) -> Tensor:
    return _named(x, torch.device("cpu")) if x.is_cuda else x


class _AtenOfGpus(TorchDispatchMode):
    """Does on the CPU what the bindings ask of torch; results are where the first tensor is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        device = next(x.device for x in tree_leaves(args) if isinstance(x, Tensor))
        args, kwargs = tree_map_only(Tensor, on_cpu, (args, kwargs or {}))
        result = function(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: on_gpu(x, device.index), result) if device.type == "cuda" else result


class OfGpu:
    """The operators for tensors of one GPU; those that are given are moved there, and results back."""

    def __init__(self, gpu: "Emulated", device: int) -> None:
        self._gpu, self._device = gpu, device

    def __getattr__(self, name: str):
        def operator(*arguments):
            there = tree_map_only(Tensor, lambda x: x if x.is_cuda else on_gpu(x, self._device), arguments)
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # that of the emulated kernel
            with _AtenOfGpus():
                results = getattr(self._gpu, name).default.redispatch(keys, *there)
            assert {x.device for x in tree_leaves(results)} == {torch.device("cuda", self._device)}
            return tree_map_only(Tensor, lambda x: on_cpu(x).clone(), results)

        return operator


class Emulated:
    """Operators by name; `Emulated(folder)` compiles and registers them, once in a process."""

    def __init__(self, folder: Path) -> None:
        flags = host_flags()
        libraries = [compile_emulated(folder, name) for name in KERNELS]
        libraries += [compile_emulated(folder, name, flags=flags) for name in LINEARS]
        target = folder / f"glue.{os.getpid()}.so"
        headers = Path(torch.__file__).parent / "include"
        command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-attributes"]
        command += [*DEFINES]
        command += ["-isystem", str(headers), *(str(SOURCES / name) for name in GLUE)]
        command += [f"-I{SOURCES}", str(TOOLKIT)]
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
    def on(self, capability: int = 80, stream: int = 0, device: int = CPU) -> Iterator[None]:
        """The device that operators take for a GPU, and the stream that is current there."""
        self._library.ptq4vm_emulate(device, capability, ctypes.c_void_p(stream))
        try:
            yield
        finally:
            self._library.ptq4vm_emulate(device, 80, None)

    def of(self, device: int) -> "OfGpu":
        return OfGpu(self, device)

    def launches(self) -> list[int]:
        """The streams of all kernels since the last call."""
        found: list[int] = []
        for library in self._kept[0]:
            streams = (ctypes.c_void_p * 4096)()
            count = library.launches(streams, len(streams))
            assert count <= len(streams)
            found += [stream or 0 for stream in streams[:count]]
        return found
