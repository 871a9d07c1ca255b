"""Times everything on a GPU, beside what the GPU cannot do faster.

    python benchmarks/gpu.py                    # six minutes of the most important; `make gpu` builds and tests before
    python benchmarks/gpu.py --minutes 30       # all rows; those that are there already are left out
    python benchmarks/gpu.py --device cpu --smoke --output rows.json    # that it runs

Every candidate is a CUDA graph; the candidates of a row take turns, and times are medians over the rounds, ratios those
of times in the same round. Single operators read other memory at every call, more than the cache holds. Rows are kept
in `benchmarks/results/<gpu>.json` as they come; they count as long as neither the kernels nor the code change. Bounds
are those of `benchmarks.speed.bounds`; a model's is that of its blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the script runs without an editable install too

import ptq4vm
from benchmarks import gpu_models
from benchmarks.gpu_rows import BATCHES, LINEARS, Candidate, Row, Setup, linear_row, operator_cases, operator_row
from benchmarks.speed import bounds
from benchmarks.speed.graphs import stopwatch
from ptq4vm import doctor
from ptq4vm.backend import native
from ptq4vm.benchmark.timing import Timing, compare, machine
from ptq4vm.formatting import table, write_json

RESULTS = Path(__file__).parent / "results"

SECONDS = 1.0
"""A row is measured for so long, not counting how it is made."""

ROUNDS = 5, 100
NO_TIME = "no time"


class Budget:
    """Time to spend; a row is begun if as long as the longest of its suite is left."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._longest: dict[str, float] = {}

    def has_time_for(self, suite: str) -> bool:
        return self._clock() + self._longest.get(suite, 0.0) < self._end

    def run(self, suite: str, work: Callable[[], Any]) -> Any:
        start = self._clock()
        try:
            return work()
        finally:
            self._longest[suite] = max(self._longest.get(suite, 0.0), self._clock() - start)


class Results:
    """Rows by key in a file, written whole after each; those of other code are not read."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.rows: dict[str, Any] = {}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["facts"]["code"] == facts["code"]:
                self.rows = kept["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        self.write()

    def write(self, **more: Any) -> None:
        write_json(self.path, {"facts": self.facts, **more, "rows": self.rows})


def code() -> str:
    """A digest of everything in this repository that a time depends on."""
    root = Path(ptq4vm.__file__).parent
    files = [*root.rglob("*.py"), *root.glob("*.so"), *Path(__file__).parent.rglob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# --- measuring ---


def rows(models: Iterable[str], batches: Iterable[int] = BATCHES) -> list[Row]:
    """Everything to time, the most important first."""
    made: list[Row] = []
    for batch in batches:
        made += [linear_row(*shape, batch) for shape in LINEARS]
        made += [operator_row(name, batch) for name in operator_cases(batch, True)]
        for place, model in enumerate(models):
            made += [gpu_models.model_row(model, batch, place), gpu_models.block_row(model, batch, place)]
    return sorted(made, key=lambda row: row.importance)


def run(
    chosen: Sequence[Row], results: Results, setup: Setup, budget: Budget, seconds: float = SECONDS
) -> dict[str, str]:
    """Measures missing rows while there is time; returns why other rows were left out."""
    left: dict[str, str] = {}
    with tqdm(chosen, unit="row", disable=None) as bar:
        for row in bar:
            if row.key in results.rows:
                continue
            bar.set_postfix_str(row.key)
            if not budget.has_time_for(row.suite):
                left[row.key] = NO_TIME
                continue
            try:
                results.add(row.key, budget.run(row.suite, partial(measure, row, setup, seconds)))
            except Exception as error:  # other rows can be measured
                left[row.key] = message(error)
            clean(setup.device)
    return left


def measure(row: Row, setup: Setup, seconds: float) -> dict[str, Any]:
    """Raises RuntimeError where no candidate can be made."""
    made: dict[str, Candidate] = {}
    graphs: dict[str, Callable[[Any], Any]] = {}
    failed: dict[str, str] = {}
    for name, make in row.candidates(setup).items():
        try:
            candidate = make()
            again = candidate.recorded(setup.device)
        except Exception as error:  # the others can be measured
            failed[name] = message(error)
            continue
        made[name], graphs[name] = candidate, without_input(again)
    if not graphs:
        raise RuntimeError("; ".join(f"{name}: {said}" for name, said in failed.items()))
    here = torch.zeros(1, device=setup.device)
    first = compare(graphs, here, warmup=1, repeats=1, stopwatch=stopwatch)
    rounds = round(seconds / max(1e-6, sum(timing.median for timing in first)))
    repeats = min(max(rounds, ROUNDS[0]), ROUNDS[1])
    timings = compare(graphs, here, warmup=2, repeats=repeats, stopwatch=stopwatch)
    base = len(made[timings[0].name].calls)
    return {
        "suite": row.suite,
        "name": row.name,
        "batch": row.batch,
        "candidates": {timing.name: figures(timing, made[timing.name], base) for timing in timings},
        "failed": failed,
    }


def without_input(call: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda _: call()


def figures(timing: Timing, candidate: Candidate, base: int) -> dict[str, Any]:
    """Microseconds of one call, spreads between quartiles, the ratio to one of the first candidate's `base` calls."""
    each, ratio = 1e6 / len(candidate.calls), base / len(candidate.calls)
    return {
        "us": timing.median * each,
        "spread": timing.spread * each,
        "ratio": timing.ratio * ratio,
        "ratio_spread": timing.ratio_spread * ratio,
        "bound": None if candidate.bound is None else 1e6 * candidate.bound,
        "rounds": timing.repeats,
    }


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- what is printed ---

UNITS = {"linears": ("µs", 1.0), "operators": ("µs", 1.0), "blocks": ("ms", 1e-3), "models": ("ms", 1e-3)}


def latencies(kept: Iterable[dict[str, Any]], factor: float) -> str:
    """As the paper's Table 4, a line a model (or what a row is of): time / bound (times as fast as the first)."""
    shown = []
    for row in kept:
        line: dict[str, Any] = {"": row["name"], "batch": row["batch"]}
        for i, (name, found) in enumerate(row["candidates"].items()):
            bound = "" if found["bound"] is None else f" / {factor * found['bound']:.4g}"
            faster = f" ({1 / found['ratio']:.2f}×)" if i else ""
            line[name] = f"{factor * found['us']:.4g}{bound}{faster}"
        shown.append(line)
    return table(shown)


WANTED = (
    ("linears", r"^(Vim|VMamba)-B ", "bf16", "W8A8 per token", 1.4, "W8A8 linears of the B models over bf16"),
    ("models", "", "W8A8 per tensor", "W8A8 per token", 1 / 1.02, "per token over per tensor"),
    ("models", "", "W8A8 dynamic", "W8A8 per token", 1.3, "per token static over per token dynamic"),
    ("models", "^vim", "fp16, mamba-ssm", "W8A8 per token", 1.6, "Vim over fp16 with mamba-ssm"),
    ("models", "^vmamba", "fp16, mamba-ssm", "W8A8 per token", 2.2, "VMamba over fp16 with mamba-ssm"),
    ("models", "^vim", "fp16", "W8A8 per token", 1.6, "Vim over fp16 with our scan"),
    ("models", "^vmamba", "fp16", "W8A8 per token", 2.2, "VMamba over fp16 with our scan"),
    ("models", "", "compiled bf16", "W8A8 per token", 1.1, "W8A8 over compiled bf16"),
)
"""Suite, names, candidate, a faster one, and how many times as fast it is to be."""


def verdicts(rows_of: Iterable[dict[str, Any]]) -> list[str]:
    """Sets the wanted ratios beside the found ones, the median and the worst row, where they were measured."""
    kept, said = list(rows_of), []
    for suite, pattern, slow, fast, wanted, what in WANTED:
        found = {
            f"{row['name']}, batch {row['batch']}": row["candidates"][slow]["ratio"] / row["candidates"][fast]["ratio"]
            for row in kept
            if row["suite"] == suite and re.search(pattern, row["name"]) and {slow, fast} <= row["candidates"].keys()
        }
        if found:
            worst = min(found, key=lambda name: found[name])
            middle = f"{statistics.median(found.values()):.2f}× (median of {len(found)})"
            said.append(f"{what}: {middle}, worst {found[worst]:.2f}× ({worst}); wanted {wanted:.2f}×")
    return said


def report(results: Results, left: Mapping[str, str], missing: Sequence[str]) -> str:
    facts = results.facts
    text = [f"{facts['gpu']}, torch {facts['machine']['torch']}, {facts['kernels']}"]
    for suite, (unit, factor) in UNITS.items():
        kept = [row for row in results.rows.values() if row["suite"] == suite]
        if kept:
            text += ["", f"{suite}: {unit} / bound (times as fast as the first)", latencies(kept, factor)]
    text += ["", *verdicts(results.rows.values()), *missing]
    for key, row in results.rows.items():
        text += [f"failed: {key}, {name} ({said})" for name, said in row["failed"].items()]
    return "\n".join([*text, *(f"left out: {key} ({reason})" for key, reason in left.items())])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    made.add_argument("--minutes", type=float, default=6.0, help="what does not fit is left out, and said")
    made.add_argument("--smoke", action="store_true", help="tiny models and inputs, few rounds, nothing is compiled")
    made.add_argument("--only", default="", help="a regular expression that rows must match")
    made.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    budget = Budget(60 * options.minutes)
    on_gpu = options.device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("there is no GPU; --device cpu --smoke shows that the script runs", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name(options.device) if on_gpu else "a CPU, with the bounds of an H200"
    setup = Setup(options.device, bounds.known(name), options.smoke)
    missing = gpu_models.missing()
    models = (gpu_models.SMOKE if options.smoke else gpu_models.MODELS) if gpu_models.can_quantize() else ()
    if on_gpu and setup.gpu is None:
        missing.append(f"there are no bounds: benchmarks/speed/bounds.py does not know {name}")
    if on_gpu and not native.supports(options.device):
        missing.append(
            f"no native kernels serve this GPU: {native.cuda_unavailable_reason() or native.cuda_architectures()}"
        )
    facts = {
        "gpu": name,
        "code": f"{code()}{'-smoke' if options.smoke else ''}",
        "machine": machine(),
        "kernels": doctor.diagnose()["operators"]["ptq4vm::linear_packed"],
        "rates": None if setup.gpu is None else dataclasses.asdict(setup.gpu),
    }
    path = options.output or RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
    results = Results(path, facts)
    chosen = [row for row in rows(models, BATCHES[: 1 if options.smoke else None]) if re.search(options.only, row.key)]
    torch.manual_seed(0)
    with torch._dynamo.config.patch(disable=options.smoke):
        left = run(chosen, results, setup, budget, 0.0 if options.smoke else SECONDS)
    results.write(left_out=left, missing=missing)
    print(report(results, left, missing))
    print(f"\nwritten to {path}")
    failed = any(row["failed"] for row in results.rows.values()) or any(said != NO_TIME for said in left.values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
