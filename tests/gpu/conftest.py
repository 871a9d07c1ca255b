"""Tests that want a GPU: `make gpu`, or `pytest tests/gpu -m gpu`.

With PTQ4VM_TEST_DEVICE=cpu they run on the CPU, without what it has not: that finds mistakes in the tests themselves.
"""

import contextlib

import pytest
import torch
from helpers.gpu_operators import DEVICE, SEED


@pytest.fixture(scope="session")
def device() -> torch.device:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return DEVICE


@pytest.fixture(scope="session")
def second_device(device) -> torch.device:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    return torch.device("cuda", 1) if device.type == "cuda" else device


class _NoStream:
    """A CPU's stream or event: everything is done at once, and the default stream is always busy."""

    def __init__(self, *device) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return False


@pytest.fixture
def streams(device, monkeypatch) -> torch.device:
    """For tests that start work on several streams."""
    if device.type == "cpu":
        for name in ("Stream", "Event"):
            monkeypatch.setattr(torch.cuda, name, _NoStream)
        for name in ("synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return device


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"tests/gpu on {DEVICE}: PTQ4VM_TEST_SEED={SEED} draws the same inputs again")
