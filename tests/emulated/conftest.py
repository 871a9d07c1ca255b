"""The kernels of csrc/cuda on the CPU. `emulated` is what tests here start from; cuda_emulator.py says how."""

from collections.abc import Callable
from pathlib import Path

import pytest
from emulated.cuda_emulator import COMPILER, Change, Library, compile_emulated


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Path:
    """The folder of what is compiled in a session, by whichever worker of pytest-xdist needs it first."""
    if COMPILER is None:
        pytest.skip("no g++ to compile the kernels with")
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def emulated(compiled) -> Callable[..., Library]:
    """emulated("quantize") is csrc/cuda/quantize.cu; with `change` it is a wrong one."""
    made: dict[tuple, Library] = {}

    def build(name: str, change: Change | None = None) -> Library:
        key = name, change
        if key not in made:
            made[key] = compile_emulated(compiled, *key)
        return made[key]

    return build
