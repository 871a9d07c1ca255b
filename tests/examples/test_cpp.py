"""examples/cpp: both programs are built, and say of images what Python says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.example_models import bundled
from helpers.strategies import normal

import ptq4vm
from ptq4vm.backend import aot, native
from ptq4vm.onnx import export, library

CPP = Path(__file__).parents[2] / "examples/cpp"
TORCH = Path(torch.__file__).parent
ONNXRUNTIME = os.environ.get("PTQ4VM_ONNXRUNTIME")
"""Folder of a release of ONNX Runtime, with include and lib."""
needs_onnxruntime = pytest.mark.skipif(
    ONNXRUNTIME is None, reason="PTQ4VM_ONNXRUNTIME names no release of ONNX Runtime"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="there is no C++ compiler or cmake"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp")
    runtime = [f"-DONNXRUNTIME={ONNXRUNTIME}"] if ONNXRUNTIME else []
    subprocess.run(["cmake", "-S", CPP, "-B", folder, f"-DTORCH={TORCH}", *runtime], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def quantized():
    return bundled("vim_micro_patch4_32.cifar10")[1]


@pytest.fixture
def images(tmp_path):
    """Three images and their file."""
    drawn = normal(3, 3, 32, 32, seed=7)
    drawn.numpy().tofile(tmp_path / "images.f32")
    return drawn, tmp_path / "images.f32"


def run(*command):
    """Returns classes and logits that a program prints."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ms per image" in done.stderr
    classes, logits = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    return list(map(int, classes)), list(map(float, logits))


def assert_says(found, model, images, tolerance):
    with torch.inference_mode():
        logits, classes = model(images).max(1)
    assert found[0] == classes.tolist()
    assert found[1] == pytest.approx(logits.tolist(), abs=tolerance)


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="there is no native library")
def test_a_compiled_package_runs_without_python(programs, quantized, images, tmp_path):
    package = aot.package(quantized, tmp_path / "model.pt2")
    found = run(programs / "run_pt2", native.LIBRARY, package, images[1], 3, 32, 32)
    assert_says(found, ptq4vm.fuse(quantized), images[0], 1e-4)
    for kernels, file, width, reason in (
        ("no.so", images[1], "32", "no.so"),
        (native.LIBRARY, "no.f32", "32", "no.f32: cannot be read"),
        (native.LIBRARY, images[1], "wide", "whole numbers"),
    ):
        command = [programs / "run_pt2", kernels, package, file, "3", "32", width]
        failed = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert failed.returncode == 1 and reason in failed.stderr and failed.stderr.count("\n") == 1


@needs_onnxruntime
@pytest.mark.parametrize("runtime", ["portable", "onnxruntime", "custom"])
def test_an_onnx_file_runs_in_onnx_runtime(programs, quantized, images, tmp_path, runtime):
    pytest.importorskip("onnxscript")
    try:
        operators = [library()] if runtime == "custom" else []
    except ImportError as error:
        pytest.skip(str(error))
    path = export(quantized, tmp_path / "model.onnx", runtime)
    found = run(programs / "run_onnx", path, images[1], *operators)
    assert_says(found, quantized, images[0], 0.15)  # codes at ties round the other way
    images[1].write_bytes(b"12345")
    failed = subprocess.run([programs / "run_onnx", path, images[1], *operators], capture_output=True, text=True)
    assert failed.returncode == 1 and "no multiple of an image's, 3072 floats" in failed.stderr
