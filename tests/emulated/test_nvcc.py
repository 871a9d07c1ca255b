"""Every kernel compiles with nvcc, where there is one, and keeps its values in registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated.cuda_emulator import SOURCES

TOOLKIT = Path("/usr/local/cuda/bin/nvcc")
KERNELS = sorted(path for path in SOURCES.glob("*.cu") if not path.stem.startswith("linear"))  # those: test_sass.py
NVCC = shutil.which("nvcc") or (str(TOOLKIT) if TOOLKIT.exists() else None)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_it_compiles_without_spills(source, architecture, tmp_path):
    command = [NVCC, "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0")}, done.stderr
    assert "warning" not in done.stderr, done.stderr
