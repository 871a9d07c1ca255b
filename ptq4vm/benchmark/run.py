"""The measurements of `ptq4vm benchmark` for every batch size and number of threads, as JSON, CSV and text."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ptq4vm.backend import native
from ptq4vm.benchmark.kinds import Network, build, builder, from_checkout
from ptq4vm.benchmark.timing import WARMUP, Timing, compare, machine
from ptq4vm.formatting import mebibytes, table
from ptq4vm.saving import WEIGHTS, save

THREADS_A_PROCESSOR = 4
"""The limit of threads: more show nothing, and very many crash the runtime that starts them."""


class Section(Protocol):
    """More to measure in every setting, of `benchmarks/speed/sections.py`: each operator's time, a forward's memory."""

    calls: int
    """Ticks a round."""

    def measure(self, images: Tensor, repeats: int, tick: Callable[[], Any]) -> None: ...

    def lines(self, setting: int) -> list[str]:
        """Returns text that follows the timings of a setting."""

    def notes(self) -> list[str]:
        """Returns text that follows all settings."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The measurements to make; raises ValueError for an unknown kind, ImportError for one that is not installed."""

    kinds: tuple[str, ...]
    """Names of `ptq4vm.benchmark.kinds`, of rivals or of other models; all are compared with the first."""
    others: Mapping[str, GraphModule] = field(default_factory=dict)
    """The other models among them, by their names."""
    batch_sizes: tuple[int, ...] = (8,)
    threads: tuple[int, ...] = (1,)
    repeats: int = 20
    sections: tuple[str, ...] = ()
    """`layers` and `memory`, which need a checkout."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in self.others:
                builder(kind)
        for section in self.sections:
            from_checkout("sections", f"--{section}")
        processors = os.cpu_count() or 1
        for count in self.threads:
            if not 1 <= count <= THREADS_A_PROCESSOR * processors:
                raise ValueError(
                    f"threads must be between 1 and {THREADS_A_PROCESSOR * processors}, {THREADS_A_PROCESSOR} for each "
                    f"of this machine's {processors} processors, got {count}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a network in floating point, and of its quantized model's file."""

    parameters: int
    gmacs: float
    """10⁹ products of linears and convolutions for one image; our operators, such as the scan, do not count."""
    file_bytes: int
    float16_bytes: int

    def __str__(self) -> str:
        return (
            f"{1e-6 * self.parameters:.2f} million parameters, {self.gmacs:.2f} GMACs an image; its file "
            f"{mebibytes(self.file_bytes)}, in FP16 {mebibytes(self.float16_bytes)} "
            f"({self.float16_bytes / self.file_bytes:.2f}× as much)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Results of a plan, as JSON types, rows of a CSV file, and text."""

    model: str
    image_size: int
    size: Size
    settings: tuple[tuple[Timing, ...], ...]
    """The timings of each batch size and number of threads."""
    sections: Mapping[str, Section]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"layers": [], "unknown_operators": [], "memory": []}
        for section in self.sections.values():
            found |= section.to_dict()
        timings = [timing.to_dict() for timing in chain.from_iterable(self.settings)]
        return {"model": self.model, "machine": machine(), **asdict(self.size), "timings": timings, **found}

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row a timing; the first columns are those of timm's benchmark.py, with its units."""
        facts = machine()
        return [
            {
                "model": self.model,
                "infer_samples_per_sec": round(timing.images_per_second, 2),
                "infer_step_time": round(1e3 * timing.median, 3),
                "infer_batch_size": timing.batch_size,
                "infer_img_size": self.image_size,
                "infer_gmacs": round(self.size.gmacs, 2),
                "param_count": round(1e-6 * self.size.parameters, 2),
                "kind": timing.name,
                "threads": timing.threads,
                "isa": facts["kernels"],
                "cpu_step_time": round(1e3 * timing.cpu, 3),
                "spread": round(1e3 * timing.spread, 3),
                "cpu_spread": round(1e3 * timing.cpu_spread, 3),
                "ratio": round(timing.ratio, 4),
                "ratio_spread": round(timing.ratio_spread, 4),
                "clock": timing.clock,
                "repeats": timing.repeats,
                "torch": facts["torch"],
            }
            for timing in chain.from_iterable(self.settings)
        ]

    def lines(self) -> list[str]:
        sections, lines = self.sections.values(), []
        for number, timings in enumerate(self.settings):
            lines += [*_timing_lines(timings), *(line for section in sections for line in section.lines(number)), ""]
        notes = (note for section in sections for note in section.notes())
        facts = ", ".join(f"{key} {value}" for key, value in machine().items() if key != "threads")
        return [*lines, *notes, f"{self.model}: {self.size}", facts]


def run(model: str, shape: tuple[int, ...], float_model: nn.Module, quantized: GraphModule, plan: Plan) -> Findings:
    """Measures a plan on noise; `shape` is that of an image."""
    images = torch.randn(max(plan.batch_sizes), *shape, generator=torch.Generator().manual_seed(0))
    settings = list(product(plan.batch_sizes, plan.threads))
    with tempfile.TemporaryDirectory() as folder:
        network = Network(float_model, quantized, Path(folder))
        sections = {
            name: from_checkout("sections", f"--{name}").SECTIONS[name](network, images, plan) for name in plan.sections
        }
        calls = len(plan.kinds) + sum(section.calls for section in sections.values())
        total = len(settings) * (WARMUP + plan.repeats) * calls
        # None: no bar where standard error is not a terminal
        with tqdm(total=total, desc="benchmark", unit="call", disable=None) as bar:
            timings = []
            for batch_size, threads in settings:
                with _threads(threads):
                    timings.append(_measure(network, images[:batch_size], plan, sections, bar))
        size = _size_of(network, images[:1])
    return Findings(model=model, image_size=shape[-1], size=size, settings=tuple(timings), sections=sections)


def _measure(
    network: Network, images: Tensor, plan: Plan, sections: Mapping[str, Section], bar: Any
) -> tuple[Timing, ...]:
    torch._dynamo.reset()  # else it makes graphs of any batch size from the second one on
    models = {}
    for kind in plan.kinds:
        bar.set_postfix_str(f"making {kind} for {len(images)} images")
        models[kind] = plan.others[kind] if kind in plan.others else build(kind, network, images)
    bar.set_postfix_str(f"{len(images)} images, {torch.get_num_threads()} threads")
    timings = compare(models, images, repeats=plan.repeats, tick=bar.update)
    for name, section in sections.items():
        bar.set_postfix_str(name)
        section.measure(images, plan.repeats, bar.update)
    return tuple(timings)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _size_of(network: Network, image: Tensor) -> Size:
    save(network.quantized, network.folder / "saved")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.model(image)
    return Size(
        parameters=sum(parameter.numel() for parameter in network.model.parameters()),
        gmacs=counter.get_total_flops() / 2e9,
        file_bytes=(network.folder / "saved" / WEIGHTS).stat().st_size,
        float16_bytes=2 * sum(tensor.numel() for tensor in network.model.state_dict().values()),
    )


def _timing_lines(timings: tuple[Timing, ...]) -> list[str]:
    """Returns a setting's heading and its table, in milliseconds."""
    first = timings[0]
    columns = {
        "name": "kind",
        "median": "ms",
        "spread": "±",
        "cpu": "CPU ms",
        "cpu_spread": "±",
        "images_per_second": "images/s",
        "ratio": f"time / {first.name}",
        "ratio_spread": "±",
    }
    seconds = ("median", "spread", "cpu", "cpu_spread")
    rows = [row | {key: 1e3 * row[key] for key in seconds} for row in map(Timing.to_dict, timings)]
    return [
        f"batch {first.batch_size}, {first.threads} thread{'s' if first.threads > 1 else ''}, {native.isa()} kernels: "
        f"medians of {first.repeats} rounds, ± from first to third quartile; "
        f"ratios of {'CPU' if first.clock == 'cpu' else 'wall'} time in the same round",
        table(rows, columns),
    ]
