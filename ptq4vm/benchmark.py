"""Timing of models side by side in one process: what slows the machine down slows all of them."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4vm import native


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long one model took for one batch."""

    name: str
    batch_size: int
    repeats: int
    median: float  # seconds
    spread: float  # seconds between the first and the third quartile
    images_per_second: float
    ratio: float  # median of the first model of the same run over this one's: above 1 is faster

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    models: Mapping[str, Callable[[Tensor], Any]], inputs: Tensor, *, warmup: int = 3, repeats: int = 20
) -> list[Timing]:
    """Calls the models in turn, once each a round; the first one is the baseline of the ratios."""
    if not models:
        raise ValueError("there is nothing to compare: give at least one model")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(warmup + repeats):
            for name, model in models.items():
                seconds[name].append(_seconds(model, inputs))
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    quartiles = {
        name: torch.tensor(values[warmup:], dtype=torch.float64).quantile(quarters).tolist()
        for name, values in seconds.items()
    }
    baseline = quartiles[next(iter(models))][1]
    return [
        Timing(
            name=name,
            batch_size=len(inputs),
            repeats=repeats,
            median=median,
            spread=third - first,
            images_per_second=len(inputs) / median,
            ratio=baseline / median,
        )
        for name, (first, median, third) in quartiles.items()
    ]


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


def _seconds(model: Callable[[Tensor], Any], inputs: Tensor) -> float:
    _wait(inputs)
    start = time.perf_counter()
    model(inputs)
    _wait(inputs)
    return time.perf_counter() - start


def _wait(inputs: Tensor) -> None:
    """Kernels on a GPU run after the call that started them returns."""
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)
