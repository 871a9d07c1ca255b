"""What nvcc makes of the linears: which instructions, how many registers, and nothing in local memory."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from cuda_cutlass import cutlass_headers
from cuda_emulator import SOURCES

pytestmark = pytest.mark.slow

FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-O2,-v")
"""With -O3, ptxas spills two registers in the main loop of the largest tile."""

KERNELS = [
    ("linear_s8", "80", "IMMA.16832.S8.S8"),
    ("linear_s4", "80", "IMMA.16864.S4.S4"),
    ("linear_s8", "90a", "IMMA.16832.S8.S8"),
]
MOST_REGISTERS = 128
"""Two blocks of 256 threads share a multiprocessor."""


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    triton = find_spec("triton")
    folders = [] if triton is None else [Path(p) for p in triton.submodule_search_locations]
    brought = [str(f / "backends" / "nvidia" / "bin" / "cuobjdump") for f in folders]
    return next(filter(None, map(shutil.which, ["cuobjdump", *brought])), None)


@pytest.mark.parametrize(("name", "arch", "multiplication"), KERNELS)
def test_kernels_multiply_on_tensor_cores_and_keep_to_registers(tmp_path, name, arch, multiplication):
    nvcc, dump, headers = shutil.which("nvcc"), cuobjdump(), cutlass_headers()
    if not (nvcc and dump and headers):
        pytest.skip("needs nvcc, cuobjdump and CUTLASS's headers")
    target = tmp_path / "kernels.o"
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *FLAGS, code, "-isystem", headers, "-c", SOURCES / f"{name}.cu", "-o", target]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", built.stderr)]
    assert len(registers) == 6 and max(registers) <= MOST_REGISTERS  # three tiles, results or codes
    assert built.stderr.count(" 0 bytes spill stores, 0 bytes spill loads") == 6

    sass = subprocess.run([dump, "-sass", target], capture_output=True, text=True, check=True).stdout
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 6
    for kernel in kernels:
        found = set(re.findall(r"\b[A-Z][A-Z0-9]+(?:\.[A-Z0-9_]+)*", kernel))
        assert {op for op in found if op.startswith("IMMA")} == {f"{multiplication}.SAT"}
        assert {"LDSM.16.M88.4", "STG.E.128" if "ELb0E" in kernel[:400] else "STG.E.64"} <= found
        assert not [op for op in found if op.startswith(("STL", "LDL", "CALL"))]
