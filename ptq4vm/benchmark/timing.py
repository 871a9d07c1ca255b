"""Times models side by side in one process: a slow machine slows all of them."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4vm.backend import native

WARMUP = 3
"""Rounds that are run and not counted."""

Seconds = tuple[float, float]
"""Wall time, and CPU time of all threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The time of one model for one batch: medians over the rounds, and spreads from first to third quartile."""

    name: str
    batch_size: int
    threads: int
    repeats: int
    median: float  # seconds on the wall
    spread: float
    cpu: float  # seconds of CPU time, of all threads of the process
    cpu_spread: float
    images_per_second: float
    clock: str
    """The ratio's clock: `cpu` with one thread of a CPU, since other processes do not count there, else `wall`."""
    ratio: float
    """The model's time over that of the first model in the same round."""
    ratio_spread: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def seconds_of(model: Callable[[Tensor], Any], inputs: Tensor) -> Seconds:
    """Returns the time of one call; `benchmarks/speed/graphs.py` times a GPU, which works after a call has returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    model(inputs)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(
    models: Mapping[str, Callable[[Tensor], Any]],
    inputs: Tensor,
    *,
    warmup: int = WARMUP,
    repeats: int = 20,
    tick: Callable[[], Any] = lambda: None,
    stopwatch: Callable[[Callable[[Tensor], Any], Tensor], Seconds] = seconds_of,
) -> list[Timing]:
    """Calls every model once a round, each round another one first.

    Args:
        models: callables by name; ratios are to the first.
        inputs: the batch (B, ...) that all are called with.
        warmup: rounds that do not count.
        repeats: rounds that count.
        tick: called after every call of a model.
        stopwatch: makes a call and returns its seconds.

    Returns:
        The timing of each model, in order.

    Raises:
        ValueError: for no models, and for numbers of rounds that make no sense.

    Example:
        >>> [timing.name for timing in compare({"sin": torch.sin, "cos": torch.cos}, torch.ones(8, 3), repeats=2)]
        ['sin', 'cos']
    """
    if not models:
        raise ValueError("there is nothing to compare: give at least one model")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    names = list(models)
    seconds: dict[str, list[Seconds]] = {name: [] for name in names}
    with torch.inference_mode():
        for number in range(warmup + repeats):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(stopwatch(models[name], inputs))
                tick()
    base = seconds[names[0]][warmup:]
    return [_timing(name, seconds[name][warmup:], base, inputs) for name in names]


def _timing(name: str, own: list[Seconds], base: list[Seconds], inputs: Tensor) -> Timing:
    clock = int(torch.get_num_threads() == 1 and not inputs.is_cuda)
    (median, spread), (cpu, cpu_spread) = map(_summary, zip(*own, strict=True))
    # a call can be shorter than a tick of a coarse clock
    ratio, ratio_spread = _summary([a[clock] / max(b[clock], 1e-9) for a, b in zip(own, base, strict=True)])
    return Timing(
        name=name,
        batch_size=len(inputs),
        threads=torch.get_num_threads(),
        repeats=len(own),
        median=median,
        spread=spread,
        cpu=cpu,
        cpu_spread=cpu_spread,
        images_per_second=len(inputs) / max(median, 1e-9),
        clock=("wall", "cpu")[clock],
        ratio=ratio,
        ratio_spread=ratio_spread,
    )


def machine() -> dict[str, Any]:
    """Returns the facts of this machine and its software that timings depend on."""
    return {
        "platform": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _summary(values: Sequence[float]) -> tuple[float, float]:
    """Returns median and interquartile range."""
    if len(values) == 1:
        return values[0], 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), third - first
