"""The kernels of csrc/cuda on the CPU. `emulated` is what tests here start from; cuda_emulator.py says how."""

from collections.abc import Callable

import pytest
from cuda_emulator import COMPILER, Change, Library, compile_emulated


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Callable[..., Library]:
    """emulated("quantize") is csrc/cuda/quantize.cu; with `change` it is a wrong one."""
    if COMPILER is None:
        pytest.skip("no g++ to compile the kernels with")
    base = tmp_path_factory.getbasetemp()
    # workers of pytest-xdist have folders side by side
    shared = base.parent if base.name.startswith("popen-") else base
    made: dict[tuple, Library] = {}

    def build(name: str, change: Change | None = None) -> Library:
        key = name, change
        if key not in made:
            made[key] = compile_emulated(shared, *key)
        return made[key]

    return build
