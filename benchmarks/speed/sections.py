"""The sections that `ptq4vm benchmark --layers --memory` adds to its timings (`ptq4vm.benchmark.run.Section`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.layers import Category, Layer, is_known, profile, totals
from benchmarks.speed.memory import Peak, measure
from benchmarks.speed.picture import draw
from ptq4vm.backend import native
from ptq4vm.benchmark.kinds import Network
from ptq4vm.benchmark.run import Plan, Section
from ptq4vm.formatting import table
from ptq4vm.graph.capture import capture
from ptq4vm.passes.lower.pipeline import converted_graph, fusing_pipeline

SLOWEST = 15
"""Rows of the table of layers."""


class LayerTimes:
    """The time of every operator of the captured, the lowered and the fused graph."""

    def __init__(self, network: Network, images: Tensor, plan: Plan) -> None:
        self.graphs = {
            "FP32": capture(network.model, (images[:2],)),
            "quantized": network.quantized,
            "fused": converted_graph(network.quantized, fusing_pipeline()),
        }
        self.calls = len(self.graphs)
        self.settings: list[dict[str, Any]] = []
        self.found: list[dict[str, list[Layer]]] = []

    def measure(self, images: Tensor, repeats: int, tick: Callable[[], Any]) -> None:
        self.settings.append({"batch_size": len(images), "threads": torch.get_num_threads()})
        self.found.append(profile(self.graphs, images, repeats=repeats, tick=tick))

    def lines(self, setting: int) -> list[str]:
        return ["", *_layer_lines(self.found[setting])]

    def notes(self) -> list[str]:
        unknown = ", ".join(self._unknown())
        return [f"counted as other, since nothing is known of them: {unknown}"] if unknown else []

    def to_dict(self) -> dict[str, Any]:
        layers = [
            setting | {"graph": name} | layer.to_dict()
            for setting, graphs in zip(self.settings, self.found, strict=True)
            for name, layers in graphs.items()
            for layer in layers
        ]
        return {"layers": layers, "unknown_operators": self._unknown()}

    def draw(self, path: str | Path, model: str) -> None:
        """Draws the layers by category."""
        panels = [
            (
                f"batch {setting['batch_size']}, {setting['threads']} thread{'s' if setting['threads'] > 1 else ''}",
                {name: totals(layers) for name, layers in graphs.items()},
            )
            for setting, graphs in zip(self.settings, self.found, strict=True)
        ]
        draw(Path(path), f"{model}: where the time goes\noperator by operator, {native.isa()} kernels", panels)

    def _unknown(self) -> list[str]:
        nodes = (node for gm in self.graphs.values() for node in gm.graph.nodes if node.op == "call_function")
        return sorted({str(node.target) for node in nodes if not is_known(node)})


class Memory:
    """The memory that one forward of each kind takes, in a process of its own."""

    calls = 0

    def __init__(self, network: Network, images: Tensor, plan: Plan) -> None:
        self.network = network
        self.kinds = [kind for kind in plan.kinds if kind not in plan.others]
        self.peaks: list[list[Peak]] = []

    def measure(self, images: Tensor, repeats: int, tick: Callable[[], Any]) -> None:
        shape = tuple(images.shape[1:])
        self.peaks.append(measure(self.network, shape, self.kinds, len(images), torch.get_num_threads()))

    def lines(self, setting: int) -> list[str]:
        rows = [
            {"kind": peak.name, "memory": None if peak.bytes is None else peak.bytes / 2**20}
            for peak in self.peaks[setting]
        ]
        return ["", table(rows, {"kind": "kind", "memory": "MiB of a forward, beside the model"})]

    def notes(self) -> list[str]:
        return []

    def to_dict(self) -> dict[str, Any]:
        return {"memory": [peak.to_dict() for peaks in self.peaks for peak in peaks]}


SECTIONS: dict[str, Callable[[Network, Tensor, Plan], Section]] = {"layers": LayerTimes, "memory": Memory}


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
    """Sums layers that differ only in the number of their block into one row, the slowest first."""
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
