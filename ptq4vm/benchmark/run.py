"""What `ptq4vm benchmark` measures and says: timings, layers and memory, for every batch size and number of threads."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.backend import native
from ptq4vm.benchmark.kinds import Network, build, check_kind
from ptq4vm.benchmark.layers import Category, Layer, is_known, profile, totals
from ptq4vm.benchmark.memory import Peak, measure
from ptq4vm.benchmark.picture import check_picture, draw
from ptq4vm.benchmark.timing import WARMUP, Timing, compare, machine
from ptq4vm.checkpoint import WEIGHTS, save
from ptq4vm.graph.capture import capture
from ptq4vm.passes.lower.pipeline import converted_graph, fusing_pipeline
from ptq4vm.report import table

__all__ = ["Findings", "Plan", "Setting", "check_picture", "run"]

SLOWEST = 15
"""Rows of the table of layers."""

THREADS_A_PROCESSOR = 4
"""More threads than that show nothing, and very many crash the runtime that starts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    kinds: tuple[str, ...]
    """Those of `ptq4vm.benchmark.kinds`, or names of other models; all are compared with the first."""
    others: tuple[str, ...] = ()
    """The names of other models among them."""
    batch_sizes: tuple[int, ...] = (8,)
    threads: tuple[int, ...] = (1,)
    repeats: int = 20
    layers: bool = False
    memory: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in self.others:
                check_kind(kind)
        processors = os.cpu_count() or 1
        for count in self.threads:
            if not 1 <= count <= THREADS_A_PROCESSOR * processors:
                raise ValueError(
                    f"threads must be between 1 and {THREADS_A_PROCESSOR * processors}, {THREADS_A_PROCESSOR} for each "
                    f"of this machine's {processors} processors, got {count}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything that was measured with one batch size and number of threads."""

    batch_size: int
    threads: int
    timings: tuple[Timing, ...]
    layers: Mapping[str, Sequence[Layer]]
    peaks: tuple[Peak, ...]

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    model: str
    image_shape: tuple[int, ...]
    parameters: int
    gmacs: float
    float16_bytes: int
    file_bytes: int
    unknown: tuple[str, ...]
    """Operators that count as `other` since nothing is known of them."""
    settings: tuple[Setting, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "model": self.model,
            "machine": machine(),
            "parameters": self.parameters,
            "gmacs": self.gmacs,
            "file_bytes": self.file_bytes,
            "float16_bytes": self.float16_bytes,
            "timings": [timing.to_dict() for setting in self.settings for timing in setting.timings],
            "layers": [
                {"batch_size": setting.batch_size, "threads": setting.threads, "graph": name} | layer.to_dict()
                for setting in self.settings
                for name, layers in setting.layers.items()
                for layer in layers
            ],
            "unknown_operators": list(self.unknown),
            "memory": [peak.to_dict() for setting in self.settings for peak in setting.peaks],
        }

    def rows(self) -> list[dict[str, Any]]:
        """One a timing; the first columns are those of timm's benchmark.py, with its units."""
        facts = machine()
        return [
            {
                "model": self.model,
                "infer_samples_per_sec": round(timing.images_per_second, 2),
                "infer_step_time": round(1e3 * timing.median, 3),
                "infer_batch_size": timing.batch_size,
                "infer_img_size": self.image_shape[-1],
                "infer_gmacs": round(self.gmacs, 2),
                "param_count": round(1e-6 * self.parameters, 2),
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
            for setting in self.settings
            for timing in setting.timings
        ]

    def draw(self, path: str | Path) -> None:
        """A picture of the layers by category."""
        panels = [
            (str(setting), {name: totals(layers) for name, layers in setting.layers.items()})
            for setting in self.settings
        ]
        draw(Path(path), f"{self.model}: where the time goes\noperator by operator, {native.isa()} kernels", panels)

    def __str__(self) -> str:
        text = [line for setting in self.settings for line in (*_lines(setting), "")]
        if self.unknown:
            text += [f"counted as other, since nothing is known of them: {', '.join(self.unknown)}"]
        saved, half = self.file_bytes / 2**20, self.float16_bytes / 2**20
        text += [
            f"{self.model}: {1e-6 * self.parameters:.2f} million parameters, {self.gmacs:.2f} GMACs an image; "
            f"its file {saved:.2f} MiB, in FP16 {half:.2f} MiB ({half / saved:.2f}× as much)"
        ]
        return "\n".join([*text, ", ".join(f"{key} {value}" for key, value in machine().items() if key != "threads")])


def run(
    model: str,
    shape: tuple[int, ...],
    float_model: nn.Module,
    quantized: GraphModule,
    plan: Plan,
    others: Mapping[str, GraphModule] | None = None,
) -> Findings:
    """Raises ValueError for a kind that is none, ImportError where one needs what is not installed."""
    others = others or {}
    random = torch.Generator().manual_seed(0)
    images = torch.randn(max(plan.batch_sizes), *shape, generator=random)
    graphs: dict[str, GraphModule] = {}
    if plan.layers:
        fused = converted_graph(quantized, fusing_pipeline())
        graphs = {"FP32": capture(float_model, (images[:2],)), "quantized": quantized, "fused": fused}
    settings = []
    with tempfile.TemporaryDirectory() as folder, _progress(plan, len(graphs)) as bar:
        network = Network(float_model, quantized, Path(folder))
        for batch_size, threads in product(plan.batch_sizes, plan.threads):
            with _threads(threads):
                settings.append(_measure(network, images[:batch_size], plan, others, graphs, bar))
        save(quantized, Path(folder) / "saved")
        size = (Path(folder) / "saved" / WEIGHTS).stat().st_size
    return Findings(
        model=model,
        image_shape=shape,
        parameters=sum(parameter.numel() for parameter in float_model.parameters()),
        gmacs=_gmacs(float_model, images[:1]),
        float16_bytes=2 * sum(tensor.numel() for tensor in float_model.state_dict().values()),
        file_bytes=size,
        unknown=_unknown(graphs.values()),
        settings=tuple(settings),
    )


def _measure(
    network: Network,
    images: Tensor,
    plan: Plan,
    others: Mapping[str, GraphModule],
    graphs: Mapping[str, GraphModule],
    bar: Any,
) -> Setting:
    torch._dynamo.reset()  # else it makes graphs of any batch size from the second one on
    calls = {}
    for kind in plan.kinds:
        bar.set_postfix_str(f"making {kind} for {len(images)} images")
        calls[kind] = others[kind] if kind in others else build(kind, network, images)
    bar.set_postfix_str(f"{len(images)} images, {torch.get_num_threads()} threads")
    timings = compare(calls, images, repeats=plan.repeats, tick=bar.update)
    layers = profile(graphs, images, repeats=plan.repeats, tick=bar.update) if graphs else {}
    peaks: list[Peak] = []
    if plan.memory:
        bar.set_postfix_str("memory")
        kinds = [kind for kind in plan.kinds if kind not in others]
        peaks = measure(network, tuple(images.shape[1:]), kinds, len(images), torch.get_num_threads())
    return Setting(
        batch_size=len(images),
        threads=torch.get_num_threads(),
        timings=tuple(timings),
        layers=layers,
        peaks=tuple(peaks),
    )


@contextmanager
def _progress(plan: Plan, graphs: int) -> Iterator[Any]:
    from tqdm import tqdm

    rounds = len(plan.batch_sizes) * len(plan.threads) * (WARMUP + plan.repeats)
    # None: no bar where standard error is not a terminal
    with tqdm(total=rounds * (len(plan.kinds) + graphs), desc="benchmark", unit="call", disable=None) as bar:
        yield bar


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gmacs(model: nn.Module, image: Tensor) -> float:
    """10⁹ products of linears and convolutions for one image; our operators, such as the scan, do not count."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() / 2e9


def _unknown(graphs: Any) -> tuple[str, ...]:
    nodes = (node for graph in graphs for node in graph.graph.nodes if node.op == "call_function")
    return tuple(sorted({str(node.target) for node in nodes if not is_known(node)}))


def _lines(setting: Setting) -> list[str]:
    first = setting.timings[0]
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
    shown = [row | {key: 1e3 * row[key] for key in seconds} for row in map(Timing.to_dict, setting.timings)]
    clock = "CPU time" if first.clock == "cpu" else "wall time"
    lines = [
        f"{setting}, {native.isa()} kernels: medians of {first.repeats} rounds, ± from first to third quartile; "
        f"ratios of {clock} in the same round",
        table(shown, columns),
    ]
    if setting.layers:
        lines += ["", *_layer_lines(setting.layers)]
    if setting.peaks:
        rows = [
            {"kind": peak.name, "memory": None if peak.bytes is None else peak.bytes / 2**20} for peak in setting.peaks
        ]
        lines += ["", table(rows, {"kind": "kind", "memory": "MiB of a forward, beside the model"})]
    return lines


def _layer_lines(graphs: Mapping[str, Sequence[Layer]]) -> list[str]:
    sums = {name: totals(layers) for name, layers in graphs.items()}
    rows: list[dict[str, Any]] = [{"category": str(kind)} for kind in (*Category, "all")]
    columns = {"category": "category"}
    for name, parts in sums.items():
        whole = sum(parts.values())
        for row, seconds in zip(rows, (*parts.values(), whole), strict=True):
            row |= {f"{name} ms": 1e3 * seconds, f"{name} %": 100 * seconds / whole}
        columns |= {f"{name} ms": f"{name} ms", f"{name} %": "%"}
    lines = [table(rows, columns)]
    head = {"op": "operator", "category": "category", "calls": "calls", "ms": "ms", "share": "%", "gops": "GOP/s"}
    for name, layers in graphs.items():
        lines += ["", table(_slowest(layers), {"name": f"{name}: slowest layers"} | head)]
    return lines


def _slowest(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Layers that differ only in the number of their block are one row."""
    alike: dict[tuple[str, str, Category], list[Layer]] = {}
    for layer in layers:
        alike.setdefault((re.sub(r"\d+", "*", layer.name), layer.op, layer.category), []).append(layer)
    rows: list[dict[str, Any]] = []
    for (name, op, kind), group in alike.items():
        seconds = sum(layer.seconds for layer in group)
        operations = sum(layer.gops * layer.seconds for layer in group if layer.gops)
        rows.append(
            {
                "name": name,
                "op": op,
                "category": str(kind),
                "calls": len(group),
                "ms": 1e3 * seconds,
                "share": 100 * sum(layer.share for layer in group),
                "gops": operations / seconds if operations else None,
            }
        )
    return sorted(rows, key=lambda row: row["ms"], reverse=True)[:SLOWEST]
