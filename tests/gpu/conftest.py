"""Tests that want a GPU: `make gpu`, or `pytest tests/gpu -m gpu`. PTQ4VM_TEST_DEVICE=cpu runs them without one."""

import pytest
import torch
from gpu_operators import DEVICE, SEED


@pytest.fixture(scope="session")
def device() -> torch.device:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return DEVICE


@pytest.fixture(scope="session")
def real_gpu(device) -> torch.device:
    """For what has no meaning on a CPU."""
    if device.type != "cuda":
        pytest.skip("a CPU has no streams, no second device and no sanitizer")
    return device


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"tests/gpu on {DEVICE}: PTQ4VM_TEST_SEED={SEED} draws the same inputs again")
