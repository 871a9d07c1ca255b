"""CUDA graphs, which record a GPU's work for a call and start it as a whole, without Python's time; their stopwatch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ptq4vm.benchmark.timing import Seconds, seconds_of

WARMUP = 3
"""Calls before recording, in which libraries choose their kernels and compilers compile."""

SLEEP_CYCLES = 200_000
"""Cycles that a GPU waits before it begins, about 0.1 ms: its work is queued by then."""


class Recorded:
    """A call with tensors of fixed shapes on a GPU, recorded; its results are overwritten by the next call."""

    def __init__(self, call: Callable[..., Any], *inputs: Tensor) -> None:
        device = inputs[0].device
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)  # the default one cannot be recorded
        with torch.cuda.device(device), torch.inference_mode():
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    call(*self._inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(self._graph, stream=stream):
                self._result = call(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Without inputs it runs again with those that it has."""
        with torch.inference_mode():
            for own, given in zip(self._inputs, inputs, strict=False):
                own.copy_(given)
            self._graph.replay()
        return self._result


def recorded(call: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    """A CUDA graph of `call`; on a CPU, which has none, `call` with the inputs of the last call."""
    if inputs[0].is_cuda:
        return Recorded(call, *inputs)
    kept = list(inputs)

    def again(*given: Tensor) -> Any:
        kept[: len(given)] = given
        with torch.inference_mode():
            return call(*kept)

    return again


def copied(result: Any) -> Any:
    """A result that the next call does not overwrite."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, result)


def stopwatch(model: Callable[[Tensor], Any], inputs: Tensor) -> Seconds:
    """Calls once; a GPU's wall time is by its own clock, since it works after the call that started it returns."""
    if not inputs.is_cuda:
        return seconds_of(model, inputs)
    with torch.cuda.device(inputs.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        cpu = time.process_time()
        start.record()
        model(inputs)
        end.record()
        cpu = time.process_time() - cpu
        end.synchronize()
        return start.elapsed_time(end) / 1000, cpu
