"""Timing of models side by side in one process: what slows the machine down slows all of them."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4vm.backend import native

WARMUP = 3
"""Rounds that are run and not counted."""

BUSY = 200_000
"""Cycles, about 0.1 ms, for which a GPU waits before it begins: what it is to do is there by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long one model took for one batch; medians over the rounds, and spreads from first to third quartile."""

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
    """What the ratio is of: `cpu` with one thread of a CPU, since other processes do not count there, else `wall`."""
    ratio: float
    """Its time over that of the first model in the same round: how many times as fast the first one is."""
    ratio_spread: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    models: Mapping[str, Callable[[Tensor], Any]],
    inputs: Tensor,
    *,
    warmup: int = WARMUP,
    repeats: int = 20,
    tick: Callable[[], Any] | None = None,
) -> list[Timing]:
    """Calls every model once a round, each round another one first; ratios are to the first of `models`.

    `tick` is called after every call of a model.
    """
    if not models:
        raise ValueError("there is nothing to compare: give at least one model")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    names = list(models)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with torch.inference_mode():
        for number in range(warmup + repeats):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(_seconds(models[name], inputs))
                if tick is not None:
                    tick()
    one_thread = torch.get_num_threads() == 1 and not inputs.is_cuda
    timings = []
    for name in names:
        wall, cpu = (list(values) for values in zip(*seconds[name][warmup:], strict=True))
        mine, others = (
            [pair[one_thread] for pair in seconds[key][warmup:]]  # the wall's time stands first
            for key in (name, names[0])
        )
        median, spread = _summary(wall)
        cpu_median, cpu_spread = _summary(cpu)
        # a call can be shorter than a tick of a coarse clock
        ratio, ratio_spread = _summary([a / max(b, 1e-9) for a, b in zip(mine, others, strict=True)])
        timings.append(
            Timing(
                name=name,
                batch_size=len(inputs),
                threads=torch.get_num_threads(),
                repeats=repeats,
                median=median,
                spread=spread,
                cpu=cpu_median,
                cpu_spread=cpu_spread,
                images_per_second=len(inputs) / max(median, 1e-9),
                clock="cpu" if one_thread else "wall",
                ratio=ratio,
                ratio_spread=ratio_spread,
            )
        )
    return timings


def machine() -> dict[str, Any]:
    """What timings depend on and a reader must know."""
    return {
        "platform": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _summary(values: list[float]) -> tuple[float, float]:
    """Median, and third less first quartile."""
    if len(values) == 1:
        return values[0], 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), third - first


def _seconds(model: Callable[[Tensor], Any], inputs: Tensor) -> tuple[float, float]:
    """On the wall, and of the CPU. A GPU's wall is its own: it works after the call that started it returns."""
    if inputs.is_cuda:
        return _seconds_of_gpu(model, inputs)
    wall, cpu = time.perf_counter(), time.process_time()
    model(inputs)
    return time.perf_counter() - wall, time.process_time() - cpu


def _seconds_of_gpu(model: Callable[[Tensor], Any], inputs: Tensor) -> tuple[float, float]:
    with torch.cuda.device(inputs.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY)
        cpu = time.process_time()
        start.record()
        model(inputs)
        end.record()
        cpu = time.process_time() - cpu
        end.synchronize()
        return start.elapsed_time(end) / 1000, cpu
