"""One repository's model on the whole road, in a process of its own: prints its row as JSON on the last line."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers.lowering import check  # type: ignore[import-not-found]
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

import ptq4vm
from benchmarks.authors_repositories import REPOSITORIES, Repository
from benchmarks.authors_stubs import Finder, OneOutput, noise
from ptq4vm.authors import stand_ins
from ptq4vm.graph.sites import LinearSite, sites_of
from ptq4vm.graph.views import parameter_of, scope
from ptq4vm.passes.lower.fuse import fusions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=Path, required=True)
    parser.add_argument("--name", required=True, choices=REPOSITORIES)
    parser.add_argument("--config", default="w8a8")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    row = Road(REPOSITORIES[options.name], options.clones).travel(options.config, options.compile)
    print(json.dumps({"name": options.name} | row), flush=True)


class Road:
    """Takes one model from its import to its fused graph, and keeps what it meets."""

    def __init__(self, repository: Repository, clones: Path) -> None:
        self.repository, self.clones = repository, clones
        self.row: dict[str, Any] = {"reached": None, "error": None, "seconds": {}}

    def travel(self, config: str, compiled: bool) -> dict[str, Any]:
        """Returns the row; the first stage that fails ends it, with its reason."""
        with stand_ins():
            try:
                self._travel(ptq4vm.QuantConfig.recipe(*_recipe(config)), compiled)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self.row["error"] = f"{self.stage}: {reason}"
        return self.row

    def _travel(self, config: ptq4vm.QuantConfig, compiled: bool) -> None:
        images = noise(3, self.repository.shape, 1)
        finder = Finder(self.repository.bare, self.repository.stubs)
        model = self._do("build", lambda: build(self.repository, self.clones, finder))
        self.row["stubbed"] = finder.stubbed
        self.row["parameters"] = sum(weight.numel() for weight in model.parameters())
        with torch.no_grad():
            wanted = self._do("forward", lambda: model(images))
        prepared = self._do("prepare", lambda: ptq4vm.prepare(model, (images[:2],), config))
        self.row |= coverage(prepared, images[:2])
        with torch.no_grad():
            self.row["capture_difference"] = difference(prepared(images), wanted)
        self._do("calibrate", lambda: ptq4vm.calibrate(prepared, [images[:2]], progress=False))
        self.row["equal_linears"] = self._do("lowered == Q/DQ", lambda: check(prepared, images))
        quantized = self._do("convert", lambda: ptq4vm.convert(prepared))
        with torch.no_grad():
            results = quantized(images)
        self.row["quantized_difference"] = difference(results, wanted)
        self._do("save and load", lambda: saved_and_loaded(quantized, images, results))
        fused = self._do("fuse", lambda: ptq4vm.fuse(quantized))
        with torch.no_grad():
            self.row["fused_difference"] = self._do("run fused", lambda: difference(fused(images), results))
        found = fusions(fused)
        left = [
            {"place": item.place, "pattern": item.pattern, "reason": item.skip_reason}
            for item in found
            if item.skip_reason
        ]
        self.row |= {"fused": len(found) - len(left), "unfused": len(left), "unfused_places": left}
        if compiled:
            runs = torch.compile(quantized, backend="ptq4vm")
            with torch.no_grad():
                self.row["compiled_difference"] = self._do("compile", lambda: difference(runs(images), results))

    def _do(self, stage: str, work: Callable[[], Any]) -> Any:
        self.stage, started = stage, time.perf_counter()
        result = work()
        self.row["seconds"][stage] = round(time.perf_counter() - started, 2)
        self.row["reached"] = stage
        return result


def _recipe(config: str) -> tuple[str, int]:
    from ptq4vm.recipes import parse

    found = parse(config)
    if found is None:
        raise ValueError(f"{config!r} is no recipe with its bits, such as w8a8 or minmax8")
    return found


def build(repository: Repository, clones: Path, finder: Finder) -> nn.Module:
    """Imports and makes the model, in evaluation mode."""
    sys.path[:0] = [str(clones / path) for path in repository.paths]
    sys.meta_path.insert(0, finder)
    module, _, attribute = repository.model.partition(":")
    model = getattr(importlib.import_module(module), attribute)(**repository.arguments)
    return (model if repository.output is None else OneOutput(model, repository.output)).eval()


def difference(values: Any, wanted: Any) -> float:
    """The largest difference of two results, in standard deviations of the second."""
    ours, theirs = torch.utils._pytree.tree_leaves(values), torch.utils._pytree.tree_leaves(wanted)
    pairs = [(x, y) for x, y in zip(ours, theirs, strict=True) if isinstance(y, Tensor)]
    return max(float((x - y).abs().max() / y.std()) for x, y in pairs)


def saved_and_loaded(quantized: GraphModule, images: Tensor, results: Any) -> None:
    """Raises AssertionError where a saved model computes other bytes."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loaded = ptq4vm.load(ptq4vm.save(quantized, Path(folder) / "model"))
        assert difference(loaded(images), results) == 0, "the loaded model computes other values"


class Multiplications(fx.Interpreter):
    """Runs a graph and counts the multiply-adds of every product of a weight with data."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.counts: dict[Node, int] = {}
        self.data: set[Node] = set()

    def run_node(self, node: Node) -> Any:
        if node.op == "placeholder" or not self.data.isdisjoint(node.all_input_nodes):
            self.data.add(node)
        constant = [value for value in node.all_input_nodes if value not in self.data]
        if node.op != "call_function" or node not in self.data or not constant or _is_filter(node):
            return super().run_node(node)
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(node)
        if counter.get_total_flops():
            self.counts[node] = counter.get_total_flops() // 2
        return result


def _is_filter(node: Node) -> bool:
    """Whether a node is a convolution of more than one point, which is no product of a weight with tokens."""
    if "conv" not in str(node.target):
        return False
    weight = node.args[1]
    return isinstance(weight, Node) and any(size != 1 for size in weight.meta["val"].shape[2:])


def coverage(prepared: GraphModule, images: Tensor) -> dict[str, Any]:
    """How many products of weights, and of their multiply-adds, are quantized; which are left."""
    with torch.no_grad():
        (counter := Multiplications(prepared)).run(images)
    sites, counts = sites_of(prepared, LinearSite), counter.counts
    done = sum(count for node, count in counts.items() if node in sites)
    left = {node: count for node, count in counts.items() if node not in sites}
    return {
        "products": len(counts),
        "quantized": len(sites),
        "multiply_adds": sum(counts.values()) // len(images),
        "multiply_adds_quantized": round(done / sum(counts.values()), 4),
        "unquantized": [
            {"node": node.name, "module": scope(node), "weight": _weight(node), "share": count / sum(counts.values())}
            for node, count in sorted(left.items(), key=lambda item: -item[1])
        ],
    }


def _weight(node: Node) -> str | None:
    return next((name for value in node.all_input_nodes if (name := parameter_of(value)) is not None), None)


if __name__ == "__main__":
    main()
