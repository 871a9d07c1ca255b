"""Libraries that are stale, broken, or built with sanitizers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.draws import needs_library

from ptq4vm import ops
from ptq4vm.backend import native
from ptq4vm.ops import _define


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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("gcc"), reason="needs cmake and gcc")
def test_the_kernels_are_clean_under_sanitizers(tmp_path):
    """The tests of native kernels again, for torch and ONNX Runtime, on those built with AddressSanitizer and
    UndefinedBehaviorSanitizer."""
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
    if all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        tests.append(str(tmp_path / "tests" / "onnx" / "test_library.py"))
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
