"""The library for GPUs, built here: it loads into torch, has every operator, and says what it needs to be built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated.cuda_cutlass import cutlass_headers
from helpers.operator_laws import WITHOUT_CUDA, name_of

from ptq4vm import ops
from ptq4vm.backend import native

pytestmark = pytest.mark.slow

SOURCES = Path(__file__).parents[2] / "csrc"
TOOLKIT = Path("/usr/local/cuda/bin/nvcc")
NVCC = shutil.which("nvcc") or (str(TOOLKIT) if TOOLKIT.exists() else None)
CMAKE = shutil.which("cmake")
needs_tools = pytest.mark.skipif(
    not (NVCC and CMAKE and shutil.which("ninja")) or torch.version.cuda is None,
    reason="needs nvcc, cmake, ninja and a torch with CUDA",
)


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [CMAKE, "-G", "Ninja", "-S", SOURCES, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    command += [f"-DPTQ4VM_TORCH={Path(torch.__file__).parent}", f"-DPython_EXECUTABLE={sys.executable}", *options]
    environment = os.environ | {"PTQ4VM_CUDA": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Built for compute capability 8.0."""
    if cutlass_headers() is None:
        pytest.skip("no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0")
    folder = tmp_path_factory.mktemp("library")
    done = configure(folder, TORCH_CUDA_ARCH_LIST="8.0")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["ninja", "-C", folder, "-j1", "_C_cuda"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout
    return folder / "cuda" / "_C_cuda.so"


LOAD = """
import sys
from pathlib import Path
import torch
from ptq4vm.backend import native
native.CUDA_LIBRARY = Path(sys.argv[1])
from ptq4vm import ops
assert native.cuda_unavailable_reason() is None, native.cuda_unavailable_reason()
assert not torch.cuda.is_initialized()
for schema in ops.SCHEMAS:
    name = "ptq4vm::" + schema.split("(", 1)[0]
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        print(name)
"""


@needs_tools
def test_it_has_every_operator_that_has_a_kernel(library):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", LOAD, library], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    names = set(map(name_of, ops.SCHEMAS)) - WITHOUT_CUDA
    assert set(done.stdout.split()) == {f"ptq4vm::{name}" for name in names}


@needs_tools
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_it_brings_the_toolkit_along(library):
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cuda" in needed and not {"libcudart", "libcuda.so", "libpython"} & set(needed.split())
    assert "libcudart" not in needed and "libcuda.so" not in needed and "libpython" not in needed


@needs_tools
@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("-DCMAKE_IGNORE_PATH={nvcc}",), {"PATH": "{bare}"}, "there is no nvcc"),
        ((), {"PTQ4VM_CUTLASS_DIR": "/nowhere"}, "no CUTLASS headers"),
        ((), {"TORCH_CUDA_ARCH_LIST": "7.5;8.0"}, "compute capabilities from 8.0 on"),
        ((), {"TORCH_CUDA_ARCH_LIST": "Ampere"}, "TORCH_CUDA_ARCH_LIST has Ampere"),
        (("-DPTQ4VM_TORCH=/nowhere",), {}, "no torch to build against"),
    ],
)
def test_what_is_missing_is_named(tmp_path, options, environment, message):
    folders = {str(Path(NVCC).parent), str(Path(NVCC).resolve().parent), str(TOOLKIT.parent)}
    bare = os.pathsep.join(folder for folder in os.environ["PATH"].split(os.pathsep) if folder not in folders)
    options = [option.format(nvcc=";".join(sorted(folders))) for option in options]
    done = configure(tmp_path, *options, **{k: v.format(bare=bare) for k, v in environment.items()})
    assert done.returncode != 0 and done.stderr.count("CMake Error") == 1
    if "TORCH_CUDA_ARCH_LIST" in environment and "no CUTLASS headers" in " ".join(done.stderr.split()):
        pytest.skip("needs CUTLASS's headers, which are asked for first")
    assert message in " ".join(done.stderr.split())


def test_a_library_that_does_not_load_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    problem = native.cuda_unavailable_reason.__wrapped__
    assert problem() == "ptq4vm was installed without PTQ4VM_CUDA=1"
    native.CUDA_LIBRARY.write_bytes(b"not a library")
    assert problem().startswith("_C_cuda.so does not load: ")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert problem() == "this torch has no CUDA"
