"""The native kernels on every instruction set here: the reference's integers, its floats but for rounding."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.draws import (
    CHANNELS,
    FEATURES,
    KINDS,
    ROWS,
    SUPPRESSED,
    available,
    draw,
    needs_library,
    qparams,
    relative,
    scan_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import doctor, ops
from ptq4vm.backend import native
from ptq4vm.backend import triton as triton_kernels
from ptq4vm.ops import _define, convolution_1d, layouts, linears, quantization, scans


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(0, 3), ROWS, CHANNELS, st.integers(2, 8), KINDS, st.booleans(), st.integers(0, 2**20))
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_codes_are_the_references(isa, dtype, images, tokens, channels, bits, kind, smooth, seed):
    random = draw(seed)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    # some values so large that they are clamped, some exactly between two codes
    x = torch.randn(images, tokens, channels, generator=random) * 10 ** (seed % 7)
    x = torch.where(torch.rand(x.shape, generator=random) < 0.3, torch.round(x) + 0.5, x).to(dtype)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    arguments = (x, 1 / scale, zero_point, inv_smooth, bits)
    assert torch.equal(ops.quantize(*arguments), quantization.quantize(*arguments))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    st.integers(0, 3), ROWS, CHANNELS, FEATURES, st.sampled_from([4, 8]), KINDS, st.booleans(), st.integers(0, 2**20)
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_the_linear_is_the_references_to_the_last_bit(
    isa, dtype, images, tokens, channels, features, bits, kind, bias, seed
):
    random, half = draw(seed), 2 ** (bits - 1)
    scale, zero_point = qparams(kind, images, tokens, bits, random)
    x = torch.randint(-half, half, (images, tokens, channels), generator=random, dtype=torch.int8)
    weight = torch.randint(1 - half, half, (features, channels), generator=random, dtype=torch.int8)
    stored = layouts.pack_int4(weight) if bits == 4 else weight
    arguments = (
        x,
        scale,
        zero_point,
        stored,
        torch.rand(features, generator=random),
        torch.randn(features, generator=random) if bias else None,
        dtype,
    )
    assert torch.equal(ops.linear(*arguments), linears.linear(*arguments))


@needs_library
def test_the_largest_accumulators_are_exact(isa):
    """All codes at their ends: nothing saturates on the way."""
    for x, w in ((-128, -127), (-128, 127), (127, 127), (127, -127)):
        codes, weight = torch.full((1, 33, 2048), x, dtype=torch.int8), torch.full((40, 2048), w, dtype=torch.int8)
        one, zero = torch.ones(1), torch.full((1,), -128, dtype=torch.int32)
        y = ops.linear(codes, one, zero, weight, torch.ones(40), None, torch.float32)
        assert torch.equal(y, torch.full_like(y, 2048.0 * (x + 128) * w))


@needs_library
@given(
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, 31, 33, 65, 197]),
    st.sampled_from([1, 15, 16, 17, 33]),
    st.sampled_from([1, 2, 3, 8, 16, 17]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_the_scan_and_its_gradients_are_the_references(isa, images, tokens, channels, states, optional, softplus, seed):
    random = draw(seed)
    inputs = scan_inputs(images, tokens, channels, states, optional, random)
    if not softplus:
        inputs = (inputs[0], inputs[1].abs(), *inputs[2:7], None)
    grad = torch.randn(images, tokens, channels, generator=random)
    exact = tuple(None if value is None else value.double() for value in inputs)
    assert relative(ops.selective_scan(*inputs, softplus), scans.selective_scan(*exact, softplus)) <= 1e-5
    ours = torch.ops.ptq4vm.selective_scan_backward(grad, *inputs, softplus)
    theirs = scans.selective_scan_backward(grad.double(), *exact, softplus)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-5


@needs_library
@given(
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, 3, 31, 33, 197]),
    st.sampled_from([1, 15, 16, 17, 33, 100]),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(max_examples=40, suppress_health_check=SUPPRESSED)
def test_the_convolution_and_its_gradients_are_the_references(isa, images, tokens, channels, taps, bias, silu, seed):
    random = draw(seed)
    x, grad = (torch.randn(images, tokens, channels, generator=random) for _ in range(2))
    weight = torch.randn(channels, taps, generator=random)
    inputs = (x, weight, torch.randn(channels, generator=random) if bias else None)
    exact = tuple(None if value is None else value.double() for value in inputs)
    assert relative(ops.causal_conv1d(*inputs, silu), convolution_1d.causal_conv1d(*exact, silu)) <= 1e-5
    ours = torch.ops.ptq4vm.causal_conv1d_backward(grad, *inputs, silu)
    theirs = convolution_1d.causal_conv1d_backward(grad.double(), *exact, silu)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-5


@needs_library
def test_the_number_of_threads_changes_no_bit(isa):
    random = draw(0)
    inputs = scan_inputs(3, 65, 40, 16, True, random)
    grad = torch.randn(3, 65, 40, generator=random)
    codes = torch.randint(-128, 128, (3, 197, 96), generator=random, dtype=torch.int8)
    weight = torch.randint(-127, 128, (200, 96), generator=random, dtype=torch.int8)
    scale, zero_point = qparams("token", 3, 197, 8, random)
    taps = torch.randn(40, 4, generator=random)

    def everything():
        return (
            ops.selective_scan(*inputs, True),
            *torch.ops.ptq4vm.selective_scan_backward(grad, *inputs, True),
            ops.causal_conv1d(inputs[0], taps, None, True),
            *torch.ops.ptq4vm.causal_conv1d_backward(grad, inputs[0], taps, None, True),
            ops.linear(codes, scale, zero_point, weight, torch.ones(200), None, torch.float32),
            ops.quantize(codes.float(), 1 / scale, zero_point, None, 8),
        )

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        two = everything()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))


@needs_library
def test_schemas_are_the_same_with_and_without_the_library():
    for schema in ops.SCHEMAS:
        name = schema.split("(", 1)[0]
        want = torch._C.parse_schema(f"ptq4vm::{schema}")
        assert str(getattr(torch.ops.ptq4vm, name).default._schema) == str(want)


def run(code: str, **environment: str) -> str:
    """What a process says that imports what this one does, from where this one does."""
    path = [str(native.LIBRARY.parents[1]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


USE = (
    "import torch; from ptq4vm import ops; from ptq4vm.backend import native\n"
    "one = torch.ones(1); zero = torch.zeros(1, dtype=torch.int32)\n"
    "q = torch.ones(1, 2, 3, dtype=torch.int8)\n"
    "for _ in range(3): y = ops.linear(q, one, zero, q[0], torch.ones(2), None, torch.float32)\n"
    "assert y.tolist() == [[[3.0, 3.0], [3.0, 3.0]]]; print(native.isa())"
)


def test_the_reference_runs_where_it_is_asked_for_and_says_nothing():
    assert run(USE, PTQ4VM_ISA="reference").strip() == "reference"


def test_without_a_library_one_warning_names_the_way_out():
    code = (
        "from pathlib import Path; import ptq4vm.backend.native; ptq4vm.backend.native.LIBRARY = Path('none.so')\n"
        + USE
    )
    said = run(code)
    assert said.count("RuntimeWarning") == 1 and "Install a C++ compiler" in said and "reference" in said


@needs_library
def test_the_environment_names_the_best_instruction_set():
    for name in available():
        assert run(USE, PTQ4VM_ISA=name).strip() == name


# --- GPUs that the library for them was not built for ---


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


@pytest.mark.slow
@needs_library
@needs_library
def test_a_library_that_is_older_than_the_code_is_an_error():
    schemas = list(ops.SCHEMAS)
    with pytest.raises(ImportError, match=r"_C_cpu.so is older than the code, without later"):
        _define.define("later(Tensor x) -> Tensor", lambda x: x, "x float ...", _define.like)
    assert schemas == ops.SCHEMAS


def test_a_library_that_does_not_load_is_said(tmp_path, monkeypatch):
    broken = tmp_path / "_C_cpu.so"
    broken.write_text("no library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    with pytest.warns(RuntimeWarning, match=r"_C_cpu.so does not load: .*; install ptq4vm again"):
        assert native._load(broken, "").startswith("_C_cpu.so does not load")


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("gcc"), reason="needs cmake and gcc")
def test_the_kernels_are_clean_under_sanitizers(tmp_path):
    """All tests of native kernels again, on those built with AddressSanitizer and UndefinedBehaviorSanitizer."""
    root = Path(__file__).parents[2]
    ignored = shutil.ignore_patterns("*.so", "pretrained", "golden", "CMakeCache.txt", "CMakeFiles", "*.ninja")
    for folder in ("ptq4vm", "tests", "csrc"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(root / "pyproject.toml", tmp_path)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "PTQ4VM_SANITIZE": "ON",
        "PTQ4VM_TORCH": Path(torch.__file__).parent,
        "SKBUILD_STATE": "editable",
    }
    build = ["cmake", "-S", "csrc", "-B", "build", *(f"-D{name}={value}" for name, value in options.items())]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", "build", "--parallel", "2"], cwd=tmp_path, check=True, capture_output=True)
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tmp_path)}
    tests = sorted(str(path) for path in (tmp_path / "tests" / "native").glob("test_*.py"))
    run_here = (  # an editable install's finder would import the library that is not sanitized
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if '_editable' not in type(finder).__module__]\n"
        "import pytest, ptq4vm.backend.native\n"
        "library = str(ptq4vm.backend.native.LIBRARY)\n"
        "assert library.startswith(sys.argv[1]), library\n"
        "sys.exit(pytest.main(sys.argv[2:]))"
    )
    test = [sys.executable, "-c", run_here, str(tmp_path), "-p", "no:xdist", *tests]
    done = subprocess.run(test, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout  # else there were no kernels
