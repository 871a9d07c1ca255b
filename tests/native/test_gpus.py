"""GPUs that the library for them was not built for."""

import warnings

import pytest
import torch
from helpers.native_library import run

from ptq4vm import doctor
from ptq4vm.backend import native
from ptq4vm.backend import triton as triton_kernels
from ptq4vm.ops import _define


@pytest.fixture
def built_for(monkeypatch):
    """As if there were a library for these architectures, and GPUs of these capabilities."""

    def build(architectures: str, *capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(native, "cuda_unavailable_reason", lambda: None)
        monkeypatch.setattr(native, "cuda_architectures", lambda: tuple(architectures.split()))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device or 0])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device}")
        native.warn_of_gpu.cache_clear()

    yield build
    native.warn_of_gpu.cache_clear()


@pytest.mark.parametrize(
    ("architectures", "runs_on", "not_on"),
    [
        ("8.0 9.0a", "8.0 8.6 8.9 9.0", "7.5 10.0 12.0"),
        ("8.6", "8.6 8.9", "8.0 9.0"),
        ("9.0a", "9.0", "8.0 8.9 10.0"),
        ("10.0a", "10.0", "10.3 11.0"),
        ("10.0f", "10.0 10.3", "9.0 11.0 12.0"),
        ("8.0 10.3a+PTX", "8.9 10.3", "9.0 10.0 11.0"),
        ("8.6+PTX 9.0a", "8.6 9.0 10.0 12.1", "7.5 8.0"),
        ("12.0f+PTX", "12.0 12.1", "13.0"),
    ],
)
def test_which_gpus_code_runs_on(built_for, architectures, runs_on, not_on):
    built_for(architectures)
    for expected, capabilities in ((True, runs_on), (False, not_on)):
        for capability in capabilities.split():
            major, minor = map(int, capability.split("."))
            assert native.has_code_for((major, minor)) is expected, capability


def test_without_a_library_no_gpu_is_served_and_none_is_looked_at(monkeypatch):
    monkeypatch.setattr(native, "cuda_unavailable_reason", lambda: "there is none")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pytest.fail("CUDA was initialized"))
    assert native.cuda_architectures() == () and not native.supports(0)


class Kernel:
    def call_boxed(self, *arguments):
        return "native", *arguments


class On:
    """A tensor on a GPU."""

    def __init__(self, device: int) -> None:
        self.device = device


def test_each_gpu_is_served_by_what_has_code_for_it(built_for):
    """Two GPUs, of which the library knows one."""
    built_for("9.0a", (8, 6), (9, 0))
    operator = _define.by_gpu(Kernel(), lambda *arguments: ("Triton", *arguments))
    known, other = On(1), On(0)
    assert operator("keys", known, 3) == ("native", "keys", known, 3)
    with pytest.warns(RuntimeWarning, match=r"built for compute capability 9\.0a, .* has 8\.6.* TORCH_CUDA_ARCH_LIST"):
        assert operator("keys", other, 3) == ("Triton", other, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert operator("keys", other, 3) == ("Triton", other, 3)


SERVED = """
import warnings
import torch
from ptq4vm import ops
from ptq4vm.backend import native
from ptq4vm.ops import _define
CALLS = []
library = torch.library.Library("ptq4vm", "IMPL")  # as the library for GPUs does
with warnings.catch_warnings(action="ignore"):  # torch 2.11 says that a kernel is replaced, though it is allowed
    for name in ("quantize", "rotate"):
        library.impl(name, lambda x, *rest: CALLS.append("native") or x.to(torch.int8), "CUDA", allow_override=True)
_define.on_gpus["quantize"] = lambda x, *rest: CALLS.append("Triton") or x.to(torch.int8)
native.cuda_unavailable_reason = lambda: None
native.cuda_architectures = lambda: ("9.0a",)
torch.cuda.device_count = lambda: len(CAPABILITIES)
torch.cuda.get_device_capability = lambda device: CAPABILITIES[device if isinstance(device, int) else -1]
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
_define.serve_other_gpus()
y = ops.quantize.default.redispatch(keys, torch.ones(2, 4), one, zero, None, 8)
z = ops.rotate.default.redispatch(keys, torch.ones(2, 4))
assert y.dtype is torch.int8 and not torch._C._dispatch_has_kernel_for_dispatch_key("ptq4vm::fake_quantize", "CUDA")
print(*CALLS, z.dtype)
"""


@pytest.mark.parametrize(
    ("capabilities", "expected", "warned"),
    [
        pytest.param([(9, 0), (9, 0)], "native native torch.int8", 0, marks=pytest.mark.slow),
        ([(9, 0), (8, 6)], "Triton torch.float32", 1),
        pytest.param([(8, 6), (9, 0)], "native native torch.int8", 0, marks=pytest.mark.slow),
    ],
)
def test_kernels_are_replaced_where_a_gpu_needs_it(capabilities, expected, warned):
    """The last GPU is the one whose tensors come; in a process of its own, since nothing undoes it."""
    said = run(f"CAPABILITIES = {capabilities}\n" + SERVED)
    assert expected in said.splitlines() and said.count("Warning: ") == warned == said.count("RuntimeWarning: ")


@pytest.mark.parametrize(
    ("capabilities", "expected", "rotation"),
    [
        ([(9, 0)], "native", "native"),
        ([(8, 6)], "Triton", "PyTorch reference"),
        ([(9, 0), (8, 6)], "Triton, native", "PyTorch reference, native"),
        ([(7, 5)], "PyTorch reference", "PyTorch reference"),
    ],
)
def test_doctor_tells_who_serves_each_gpu(built_for, monkeypatch, capabilities, expected, rotation):
    built_for("9.0a", *capabilities)
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda: None)
    monkeypatch.setattr(doctor, "_has_kernel", lambda operator, key: key == "CUDA")
    found = doctor.diagnose()
    assert found["native"]["cuda_architectures"] == ("9.0a",)
    assert [gpu["native"] for gpu in found["gpus"]] == [capability == (9, 0) for capability in capabilities]
    for operator, who in (("quantize", expected), ("rotate", rotation)):
        assert found["operators"][f"ptq4vm::{operator}"] in (f"CUDA ({who})", who)
