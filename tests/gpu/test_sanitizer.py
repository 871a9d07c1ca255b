"""compute-sanitizer over all laws of operators: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.gpu_operators import SEED

pytestmark = pytest.mark.gpu

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
FOUND = 9
SECONDS = 200


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(device, tool):
    """A CPU runs what would be looked at, and nothing looks."""
    if device.type == "cpu" and tool != "memcheck":
        pytest.skip("on a CPU it is the same")
    if device.type == "cuda" and SANITIZER is None:
        pytest.skip("there is no compute-sanitizer")
    law = f"{Path(__file__).with_name('test_operators.py')}::test_a_law_holds"
    pytest_ = [sys.executable, "-S", "-m", "pytest", law, "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    settings = {
        "PTQ4VM_TEST_EXAMPLES": "2",
        "PTQ4VM_TEST_SEED": str(SEED),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # every tensor by itself, so that its ends are seen
    }
    sanitizer = [SANITIZER, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    command = [*(sanitizer if device.type == "cuda" else ()), *pytest_]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=SECONDS)
    said = done.stdout + done.stderr
    if "Device not supported" in said or "not supported on this" in said:
        pytest.skip(f"compute-sanitizer does not run here: {said.strip().splitlines()[-1]}")
    assert done.returncode == 0, said[-8000:]
    assert "0 errors" in said or "0 hazards" in said or device.type == "cpu", said[-2000:]
