"""Operators that Triton has, its kernels interpreted on the CPU, and their compiled code."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import ptq4vm
from ptq4vm import ops
from ptq4vm.backend import native
from ptq4vm.backend import triton as triton_kernels

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def release(package: str) -> tuple[int, ...]:
    return tuple(map(int, version(package).split(".")[:2]))


@pytest.fixture
def interpreter():
    if release("triton") <= (3, 6) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs a numpy before 2.4")


@needs_triton
@pytest.mark.parametrize("examples", [0, pytest.param(12, marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_the_references(interpreter, examples):
    """In a process of its own: Triton decides when it is imported whether to interpret."""
    here = Path(__file__).parents[1]
    path = [str(Path(ptq4vm.__file__).parents[1]), *sys.path]
    settings = {"TRITON_INTERPRET": "1", "PTQ4VM_TEST_EXAMPLES": str(examples), "PYTHONPATH": os.pathsep.join(path)}
    # -S: this process's path and no other
    command = [sys.executable, "-S", "-m", "pytest", here / "helpers" / "triton_interpreted.py", "--noconftest"]
    options = ["-p", "no:cacheprovider", "-m", "slow or not slow" if examples else "not slow"]
    done = subprocess.run([*command, *options], env=os.environ | settings, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_operator_has_an_implementation_for_cuda():
    """The reference, unless there is a kernel."""
    for schema in ops.SCHEMAS:
        name = schema.split("(", 1)[0]
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"ptq4vm::{name}", "CUDA"), name


def test_every_kernel_is_an_operator():
    assert triton_kernels.MODULES.keys() <= {schema.split("(", 1)[0] for schema in ops.SCHEMAS}


@pytest.fixture
def ready(monkeypatch):
    """As if PyTorch had CUDA and Triton were there."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: object())
    monkeypatch.delenv("PTQ4VM_ISA", raising=False)
    triton_kernels.unavailable_reason.cache_clear()
    yield
    triton_kernels.unavailable_reason.cache_clear()


def test_kernels_serve_where_they_can(ready):
    assert triton_kernels.unavailable_reason() is None


@pytest.mark.parametrize("reason", ["no CUDA", "Triton is not", "PTQ4VM_ISA=reference"])
def test_kernels_do_not_serve_otherwise(ready, monkeypatch, reason):
    if reason == "no CUDA":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif reason == "Triton is not":
        monkeypatch.setattr(triton_kernels, "find_spec", lambda name: None)
    else:
        monkeypatch.setenv("PTQ4VM_ISA", "reference")
    assert reason in triton_kernels.unavailable_reason()
    assert triton_kernels.operator("quantize", otherwise := object()) is otherwise


def test_operators_are_registered_where_they_serve():
    for name in triton_kernels.MODULES:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"ptq4vm::{name}", "CUDA")
        assert registered == (triton_kernels.unavailable_reason() is None or native.cuda_unavailable_reason() is None)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "reference"), ((8, 0), "kernel"), ((12, 0), "kernel")])
def test_an_old_gpu_takes_the_reference(ready, monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_kernels, "run", lambda name, *arguments: ("kernel", name, *arguments))
    operator = triton_kernels.operator("quantize", lambda *arguments: ("reference", "quantize", *arguments))
    x = torch.zeros(1)
    assert operator(x, 2) == (expected, "quantize", x, 2)


# --- machine code ---


def numbers(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape):
    return numbers(*shape, dtype=torch.int32)


def linear(channels, features, bits, rows=6304, tiles=True):
    width, dtype = (32, torch.uint8) if bits == 4 else (64, torch.int8)
    shape = (-(-features // 16), -(-channels // 64), 16, width) if tiles else (features, channels * width // 64)
    weight = numbers(*shape, dtype=dtype)
    x = numbers(1, rows, channels, dtype=torch.int8)
    return x, numbers(1), integers(1), weight, integers(features), numbers(features), numbers(features)


TOKENS = 197
CODES = (numbers(TOKENS), integers(TOKENS), numbers(384), 8)
HALF = torch.bfloat16
X = numbers(32, TOKENS, 384, dtype=HALF)
MAPS = numbers(32, 196, 384, dtype=HALF)

PRODUCERS = {
    "quantize": (X, *CODES),
    "norm_quantize": (X, numbers(32, TOKENS, 384), numbers(384), numbers(384), 1e-5, False, False, *CODES),
    "causal_conv1d": (X, numbers(384, 4), numbers(384), True),
    "conv1d_quantize": (
        X,
        numbers(2, 384, 4),
        numbers(2, 384),
        integers(2, TOKENS),
        numbers(2, TOKENS),
        integers(2, TOKENS),
        numbers(2, 384),
        8,
    ),
    "conv2d_quantize": (
        MAPS,
        numbers(384, 3, 3),
        numbers(384),
        14,
        14,
        numbers(4, 196),
        integers(4, 196),
        numbers(4, 384),
        8,
    ),
}
LINEARS = {
    "linear": (*linear(384, 1536, 8, tiles=False)[:4], numbers(1536), None, HALF),
    "linear_packed, 8 bits": (*linear(384, 1536, 8, tiles=False), HALF),
    "linear_packed, 4 bits": (*linear(384, 1536, 4, tiles=False), HALF),
    "linear_packed, 8 bits in tiles": (*linear(384, 1536, 8), HALF),
    "linear_packed, 4 bits in tiles": (*linear(384, 1536, 4), HALF),
    "linear_packed, 8 bits, few channels": (*linear(24, 768, 8), HALF),
    "linear_packed, 8 bits, few features": (*linear(768, 56, 8), HALF),
    "linear_packed, 4 bits, few rows": (*linear(768, 384, 4, rows=17), HALF),
    "linear_gelu_quantize": (
        *linear(384, 1536, 8),
        False,
        numbers(TOKENS * 32),
        integers(TOKENS * 32),
        numbers(1536),
        8,
    ),
}
INSTRUCTIONS = {80: r"IMMA\.16832\.S8\.S8\.SAT", 90: r"IGMMA\.64x\d+x32\.S8\.S8"}


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    triton_compiler = pytest.importorskip("triton_compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def build(name, arguments, capability):
        kernel = triton_compiler.compile_operator(
            name, *arguments, capability=capability, folder=tmp_path, monkeypatch=monkeypatch
        )
        assert kernel.local == 0 and not re.search(r"\b(STL|LDL)\b", kernel.sass)
        return kernel

    return build


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", PRODUCERS)
def test_producers_read_sixteen_bytes_at_a_time_and_keep_to_registers(compiled, name, capability):
    kernel = compiled(name, PRODUCERS[name], capability)
    assert kernel.registers <= 128
    assert "LDG.E.128" in kernel.sass and "STG.E.128" in kernel.sass
    if name == "quantize":
        assert "FFMA" not in kernel.sass  # a product and a sum that are rounded at once


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", LINEARS)
def test_linears_multiply_on_tensor_cores_and_keep_to_registers(compiled, name, capability):
    kernel = compiled(name.split(",")[0], LINEARS[name], capability)
    few_rows = "few rows" in name  # less than wgmma multiplies
    instruction = INSTRUCTIONS[80 if few_rows else capability]
    found = set(re.findall(r"\bI[A-Z]*MMA[\w.]*", kernel.sass))
    assert found and all(re.fullmatch(instruction, operation) for operation in found)
    assert "LDGSTS.E.BYPASS.128" in kernel.sass  # straight to shared memory
    if name != "linear_gelu_quantize":
        assert "FFMA" not in kernel.sass


def sizes(batch, tokens, channels, directions):
    """Every operator's arguments."""
    x, row = numbers(batch, tokens, channels), (directions, tokens)
    one = (numbers(tokens), integers(tokens), numbers(channels), 8)
    many = (numbers(*row), integers(*row), numbers(directions, channels), 8)
    lead = () if directions == 1 else (directions,)
    codes = numbers(*lead, batch, tokens, channels, dtype=torch.int8)
    columns = channels + -channels % 16
    weight = (numbers(*lead, channels, columns, dtype=torch.int8), integers(*lead, channels))
    scale, qparams = numbers(*lead, channels), (numbers(*lead, tokens), integers(*lead, tokens))
    return {
        "quantize": (x, *one),
        "norm_quantize": (x, x, numbers(channels), None, 1e-5, True, False, *one),
        "causal_conv1d": (x, numbers(channels, 4), None, True),
        "conv1d_quantize": (x, numbers(directions, channels, 4), None, integers(*row), *many),
        "conv2d_quantize": (x, numbers(channels, 3, 3), None, tokens, 1, *many),
        "linear_packed": (codes, *qparams, *weight, scale, None, torch.float32),
    }


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", sizes(1, 1, 1, 1))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2**17, 2**15, 16, 3)], ids=str)
def test_kernels_compile_for_sizes_that_are_constants_and_for_those_of_64_bits(compiled, name, shape):
    """Triton makes a constant of a size of one; the others have more rows, or more numbers, than 32 bits count."""
    compiled(name, sizes(*shape)[name], 80)
