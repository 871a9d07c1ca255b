"""Compiled linears: their instructions, how many registers, and nothing in local memory."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from emulated.cuda_cutlass import cutlass_headers
from emulated.cuda_emulator import SOURCES

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


MOST_REGISTERS_SM90 = 168
"""Registers of the 384 threads that have a multiprocessor for themselves; multiplying ones take from loading ones."""


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    triton = find_spec("triton")
    folders = [] if triton is None else [Path(p) for p in triton.submodule_search_locations]
    brought = [str(f / "backends" / "nvidia" / "bin" / "cuobjdump") for f in folders]
    return next(filter(None, map(shutil.which, ["cuobjdump", *brought])), None)


def compiled(folder: Path, name: str, arch: str) -> tuple[str, list[str]]:
    """Returns what ptxas says, and the SASS of each kernel; none has anything in local memory or calls functions."""
    nvcc, dump, headers = shutil.which("nvcc"), cuobjdump(), cutlass_headers()
    if not (nvcc and dump and headers):
        pytest.skip("needs nvcc, cuobjdump and CUTLASS's headers")
    target = folder / "kernels.o"
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *FLAGS, code, "-isystem", headers, "-c", SOURCES / f"{name}.cu", "-o", target]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    sass = subprocess.run([dump, "-sass", target], capture_output=True, text=True, check=True).stdout
    kernels = sass.split("Function : ")[1:]
    assert built.stderr.count(" 0 bytes spill stores, 0 bytes spill loads") == len(kernels)
    assert not [op for kernel in kernels for op in instructions(kernel) if op.startswith(("STL", "LDL", "CALL"))]
    return built.stderr, kernels


def instructions(kernel: str) -> set[str]:
    return set(re.findall(r"\b[A-Z][A-Z0-9]+(?:\.[A-Za-z0-9_]+)*", kernel))


def registers(said: str) -> list[int]:
    return [int(count) for count in re.findall(r"Used (\d+) registers", said)]


@pytest.mark.parametrize(("name", "arch", "multiplication"), KERNELS)
def test_kernels_multiply_on_tensor_cores_and_keep_to_registers(tmp_path, name, arch, multiplication):
    said, kernels = compiled(tmp_path, name, arch)
    assert len(kernels) == 6 and max(registers(said)) <= MOST_REGISTERS  # three tiles, results or codes
    for kernel in kernels:
        found = instructions(kernel)
        assert {op for op in found if op.startswith("IMMA")} == {f"{multiplication}.SAT"}
        assert {"LDSM.16.M88.4", "STG.E.128" if "ELb0E" in kernel[:400] else "STG.E.64"} <= found


def test_sm90_loads_tensors_and_multiplies_by_warp_groups(tmp_path):
    said, kernels = compiled(tmp_path, "linear_s8_sm90", "90a")
    assert "wgmma" not in said  # as in "wgmma.mma_async instructions are serialized"
    assert len(kernels) == 4 and max(registers(said)) <= MOST_REGISTERS_SM90  # two tiles, results or codes
    for kernel in kernels:
        found = instructions(kernel)
        assert {op for op in found if "MMA." in op} == {"IGMMA.64x128x32.S8.S8"}
        stores = "STG.E.64" if "LinearEpilogueSm90ILb1E" in kernel.split("\n")[0] else "STG.E.128"
        assert {"UTMALDG.3D", "SHFL.BFLY", stores} <= found
