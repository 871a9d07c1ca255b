"""The operators on a GPU, with arguments and results on the CPU, for the laws of operator_laws.py.

Memory for results is garbage: every operator runs twice, on other garbage, and must give the same bits.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, seed, settings
from torch import Tensor
from torch.utils._pytree import tree_map

from ptq4vm.backend import triton as triton_kernels

DEVICE = torch.device(os.environ.get("PTQ4VM_TEST_DEVICE", "cuda"))
SEED = int(os.environ.get("PTQ4VM_TEST_SEED") or secrets.randbelow(2**20))
EXAMPLES = int(os.environ.get("PTQ4VM_TEST_EXAMPLES", "24"))

GARBAGE = (0xFF, 0x7B)
"""Bytes: NaN and -1, large numbers and 123."""

BLOCKS = (2**18,) * 8 + (2**20,) * 8 + (2**25,)
"""Bytes that are filled with garbage and freed, for the allocator to give them to results."""


def drawn(examples: int = EXAMPLES) -> Callable[[Callable], Callable]:
    """Settings of a test with `given`: other inputs each time, unless PTQ4VM_TEST_SEED says which."""
    chosen = settings(
        max_examples=min(examples, EXAMPLES),
        derandomize=False,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(SEED)(chosen(test))


def moved(x: Any, device: torch.device) -> Any:
    """On another device as it lies: with its strides, its offset, and what is around it."""
    if not isinstance(x, Tensor):
        return x
    around = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device, copy=True)
    return around.as_strided(x.shape, x.stride(), x.storage_offset())


@contextmanager
def garbage(byte: int, device: torch.device) -> Iterator[None]:
    """Contents of memory that is allocated; on a CPU it is torch's choice of a byte."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else older blocks would be given first
        blocks = [torch.full((size,), byte, dtype=torch.uint8, device=device) for size in BLOCKS]
        del blocks
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous()
    return same and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def operator(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.ptq4vm, name)


def in_triton(name: str) -> Callable[..., Any]:
    return lambda *arguments: triton_kernels.run(name, *arguments)


class OnDevice:
    """`OnDevice(device).quantize` is `ptq4vm::quantize` there."""

    def __init__(self, device: torch.device, find: Callable[[str], Callable[..., Any]] = operator) -> None:
        self.device, self.find = device, find

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = self.find(name)

        def run(*arguments: Any) -> Any:
            there = [moved(argument, self.device) for argument in arguments]
            results = []
            for byte in GARBAGE:
                with garbage(byte, self.device):
                    results.append(call(*there))
            first, second = ([y] if isinstance(y, Tensor) else list(y) for y in results)
            assert all(y.device == there[0].device for y in first)
            assert all(map(same_bits, first, second)), "the result depends on what was in its memory"
            return tree_map(Tensor.cpu, results[0])

        return run


class OnStream:
    """The operators on a stream of their own, while the default one is busy: what is started there would wait."""

    CYCLES = 400_000_000  # a fifth of a second

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = operator(name)

        def run(*arguments: Any) -> Any:
            there = [moved(argument, self.device) for argument in arguments]
            torch.cuda.synchronize(self.device)
            with torch.cuda.stream(self.stream):
                call(*there)  # loads the kernels and finds memory, for which a GPU may wait
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(self.CYCLES)
            busy = torch.cuda.Event()
            busy.record()
            with torch.cuda.stream(self.stream):
                here = tree_map(Tensor.cpu, call(*there))
            assert not busy.query(), f"{name} waited for another stream"
            torch.cuda.synchronize(self.device)
            return here

        return run
