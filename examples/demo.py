"""Quantize the bundled Vims with every recipe of the paper's ladder and show the cost of each.

    python examples/demo.py                   one calibration seed and short learning: minutes on two cores
    python examples/demo.py --seeds 3 --full  three seeds and the presets' epochs, as in docs/results.md

Writes results.json, results.csv and results.png into --output, by default beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the script runs without an editable install too

import ptq4vm
import ptq4vm.models
from benchmarks.recipes import config_of
from benchmarks.subject import Subject
from ptq4vm import benchmark, formatting
from ptq4vm.backend import native
from ptq4vm.config import QuantConfig
from ptq4vm.evaluate import Evaluation
from ptq4vm.inspection.phenomena import Phenomena, observe
from ptq4vm.optional_packages import pyplot

Row = dict[str, Any]

MODELS = {"plain": "vim_nano_patch4_32.digits", "hard": "vim_nano_patch4_32.digits_hard"}
SHORT, FULL = {8: 4, 6: 8, 4: 16}, {8: 10, 6: 50, 4: 100}
IMAGES = 64
"""Calibration images, distinct and without augmentation."""
TIMED = 32
"""Images of a timed call."""

COLUMNS = {
    "model": "model",
    "bits": "bits",
    "method": "method",
    "top1": "top-1 %",
    "spread": "±",
    "agreement": "agree %",
    "divergence": "KL ·1000",
    "kilobytes": "kB",
    "ms_per_image": "ms/image",
    "speed": "× FP32",
    "calibrate_s": "calibrate s",
}


LADDER = {
    "MinMax": "minmax",
    "SmoothQuant": "smoothquant",
    "PTS": "pts",
    "PTS + truncation": "pts+truncation",
    "PTS + truncation + JLSS": "ptq4vm",
}
"""The rungs of the paper's table 6, MinMax below them, and our recipes for them."""


def row(label: str, bits: str, method: str, module: nn.Module, costs: list[Evaluation], seconds: list[float]) -> Row:
    top1 = [cost.top1 for cost in costs]
    return {
        "model": label,
        "bits": bits,
        "method": method,
        "top1": round(statistics.mean(top1), 2),
        "spread": round((max(top1) - min(top1)) / 2, 2),
        "agreement": round(statistics.mean(cost.agreement for cost in costs), 2),
        "divergence": round(1e3 * statistics.mean(cost.divergence for cost in costs), 2),
        "kilobytes": round(formatting.model_bytes(module) / 1e3),
        "calibrate_s": round(statistics.mean(seconds), 1),
    }


def climb(label: str, subject: Subject, seeds: int, epochs: dict[int, int], bar: tqdm) -> list[Row]:
    """A row a rung, with times measured side by side at the end."""
    rows = [row(label, "FP32", "FP32", subject.model, [subject.evaluate(subject.model)], [0.0])]
    modules: dict[str, nn.Module] = {"FP32": subject.model}
    for bits in epochs:
        for method, recipe in LADDER.items():
            costs = []
            for seed in range(seeds):
                bar.set_postfix_str(f"{label} W{bits}A{bits} {method}, seed {seed}")
                config = config_of(recipe, bits, seed, epochs[bits])
                costs.append(subject.quantize(config, IMAGES, fused=False))
                bar.update()
            quantized, evaluations = costs[-1].quantized, [cost.evaluation for cost in costs]
            seconds = [cost.seconds for cost in costs]
            rows.append(row(label, f"W{bits}A{bits}", method, quantized, evaluations, seconds))
            modules[f"{bits} {method}"] = ptq4vm.fuse(quantized)
    timings = benchmark.compare(modules, subject.test[0][0][:TIMED], warmup=1, repeats=5)
    for made, timing in zip(rows, timings, strict=True):
        made |= {"ms_per_image": round(1e3 * timing.median / TIMED, 2), "speed": round(1 / timing.ratio, 2)}
    return rows


def phenomena(label: str, subject: Subject) -> list[Row]:
    """The largest figures over the blocks, by kind of linear."""
    kinds: dict[str, list[Phenomena]] = {}
    for name, figure in observe(subject.prepared(QuantConfig()), subject.calibration(IMAGES, 0)).items():
        kinds.setdefault(name.rpartition(".")[2], []).append(figure)
    return [
        {"model": label, "input of": kind}
        | {key: round(max(figure.to_dict()[key] for figure in found), 1) for key in found[0].to_dict()}
        for kind, found in kinds.items()
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Against the rung: top-1 above, divergence from FP32 below; a column a model, a line a number of bits."""
    plot = pyplot()
    labels = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plot.subplots(
        2, len(labels), figsize=(6 * len(labels), 7), sharex="col", sharey="row", squeeze=False
    )
    for column, label in zip(axes.T, labels, strict=True):
        own = [row for row in rows if row["model"] == label]
        methods = list(dict.fromkeys(row["method"] for row in own if row["method"] != "FP32"))
        column[0].axhline(own[0]["top1"], color="0.5", linestyle="--", linewidth=1, label=f"FP32 {own[0]['top1']:.1f}")
        for bits, color in (("W8A8", "tab:green"), ("W6A6", "tab:orange"), ("W4A4", "tab:red")):
            line = [row for row in own if row["bits"] == bits]
            style = {"color": color, "marker": "o", "capsize": 3, "label": bits}
            top1, spread = [row["top1"] for row in line], [row["spread"] for row in line]
            column[0].errorbar(range(len(line)), top1, spread, **style)
            column[1].errorbar(range(len(line)), [row["divergence"] / 1000 for row in line], **style)
        column[0].set_title(f"vim_nano_patch4_32 on digits, {label}")
        column[0].legend(loc="lower right")
        column[1].set_yscale("log")
        column[1].set_xticks(range(len(methods)), [method.replace(" + ", "\n+ ") for method in methods])
        for axis in column:
            axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("top-1, % of 450 test images")
    axes[1][0].set_ylabel("KL divergence from FP32, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="calibration sets to average over")
    parser.add_argument("--full", action="store_true", help="learn for as many epochs as the presets")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()

    started = time.perf_counter()
    epochs = FULL if options.full else SHORT
    models = {label: timm.create_model(name, pretrained=True).eval() for label, name in MODELS.items()}
    subjects = {label: Subject(model, "digits", batch_size=150) for label, model in models.items()}
    total = len(subjects) * len(epochs) * len(LADDER) * options.seeds
    rows: list[Row] = []
    with tqdm(total=total, desc="quantize and evaluate", unit="model") as bar:
        for label, subject in subjects.items():
            rows += climb(label, subject, options.seeds, epochs, bar)
    figures = [figure for label, subject in subjects.items() for figure in phenomena(label, subject)]

    print(
        "\nTop-1 of 450 held-out digits; agreement is with the predictions of FP32; times are of the fused\n"
        f"models and FP32, side by side in this process, on {native.isa()} kernels.\n"
    )
    print(formatting.table(rows, COLUMNS))
    print("\nThe paper's three phenomena at the linears' inputs (largest over the blocks; 1 = none):\n")
    print(formatting.table(figures))
    facts = {"machine": benchmark.machine(), "seeds": options.seeds, "epochs": epochs, "images": IMAGES}
    formatting.write_json(options.output / "results.json", facts | {"rows": rows, "phenomena": figures})
    formatting.write_csv(options.output / "results.csv", rows)
    draw(rows, options.output / "results.png")
    names = ", ".join(f"results.{kind}" for kind in ("json", "csv", "png"))
    print(f"\nwrote {names} to {options.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
