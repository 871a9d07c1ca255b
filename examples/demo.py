"""Quantize the bundled Vims with every recipe of the paper's ladder and show what each costs.

    python demo/run.py                   one calibration seed and short learning: minutes on two cores
    python demo/run.py --seeds 3 --full  three seeds and the presets' epochs, as in docs/results.md

Writes results.json, results.csv and results.png into --output, by default beside this file.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.fx import GraphModule
from tqdm import tqdm

import ptq4vm
import ptq4vm.models
from ptq4vm import benchmark, native, report
from ptq4vm.config import Learning, QuantConfig
from ptq4vm.data import calibration_batches, loader, open_dataset, transform_for
from ptq4vm.evaluate import evaluate, predictions
from ptq4vm.observers import Phenomena, observe
from ptq4vm.pipeline import canonical_graph, prepared_from

MODELS = {"plain": "vim_nano_patch4_32.digits", "hard": "vim_nano_patch4_32.digits_hard"}
SHORT, FULL = {8: 4, 6: 8, 4: 16}, {8: 10, 6: 50, 4: 100}
IMAGES = 64
"""Calibration images, distinct and without augmentation."""
TIMED = 32
"""Images a timed call takes."""

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


def ladder(bits: int, epochs: int, seed: int) -> dict[str, QuantConfig]:
    """The rungs of the paper's table 6, MinMax below them."""
    ours: dict[str, Any] = {"weight_bits": bits, "activation_bits": bits, "seed": seed}
    return {
        "MinMax": QuantConfig.minmax(bits, seed=seed),
        "SmoothQuant": QuantConfig.smoothquant(bits, seed=seed),
        "PTS": QuantConfig(**ours, range_search=False),
        "PTS + truncation": QuantConfig(**ours),
        "PTS + truncation + JLSS": QuantConfig(**ours, learning=Learning(epochs=epochs)),
    }


class Subject:
    """One bundled model with its images."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.model = timm.create_model(MODELS[label], pretrained=True).eval()
        transform = transform_for(self.model)
        self.train = open_dataset("digits", "train", transform)
        self.test = list(loader(open_dataset("digits", "test", transform), 150))
        self.example = (self.test[0][0][:2],)
        self.graph = canonical_graph(self.model, self.example)
        self.logits = predictions(self.model, self.test)

    def evaluate(self, module: nn.Module) -> Any:
        return evaluate(module, self.test, reference_predictions=self.logits, progress=False, check_finite=True)

    def prepared(self, config: QuantConfig) -> GraphModule:
        """As `ptq4vm.prepare`, from a graph that is captured once."""
        return prepared_from(copy.deepcopy(self.graph), self.model, self.example, config)

    def calibration(self, seed: int) -> list[torch.Tensor]:
        return calibration_batches(self.train, IMAGES, 32, seed)

    def row(self, bits: str, method: str, module: nn.Module, evaluations: list[Any], seconds: list[float]) -> dict:
        top1 = [evaluation.top1 for evaluation in evaluations]
        return {
            "model": self.label,
            "bits": bits,
            "method": method,
            "top1": round(statistics.mean(top1), 2),
            "spread": round((max(top1) - min(top1)) / 2, 2),
            "agreement": round(statistics.mean(evaluation.agreement for evaluation in evaluations), 2),
            "divergence": round(1e3 * statistics.mean(evaluation.divergence for evaluation in evaluations), 2),
            "kilobytes": round(report.model_bytes(module) / 1e3),
            "calibrate_s": round(statistics.mean(seconds), 1),
        }

    def climb(self, seeds: int, epochs: dict[int, int], bar: tqdm) -> list[dict[str, Any]]:
        """A row a rung, with times measured side by side at the end."""
        exact = self.evaluate(self.model)
        rows = [self.row("FP32", "FP32", self.model, [exact], [0.0])]
        modules: dict[str, nn.Module] = {"FP32": self.model}
        for bits in epochs:
            for method in ladder(bits, 1, 0):
                evaluations, seconds = [], []
                for seed in range(seeds):
                    bar.set_postfix_str(f"{self.label} W{bits}A{bits} {method}, seed {seed}")
                    prepared = self.prepared(ladder(bits, epochs[bits], seed)[method])
                    started = time.perf_counter()
                    ptq4vm.calibrate(prepared, self.calibration(seed), progress=False)
                    seconds.append(time.perf_counter() - started)
                    quantized = ptq4vm.convert(prepared)
                    evaluations.append(self.evaluate(quantized))
                    bar.update()
                rows.append(self.row(f"W{bits}A{bits}", method, quantized, evaluations, seconds))
                modules[f"{bits} {method}"] = ptq4vm.fuse(quantized)
        timings = benchmark.compare(modules, self.test[0][0][:TIMED], warmup=1, repeats=5)
        for row, timing in zip(rows, timings, strict=True):
            row |= {"ms_per_image": round(1e3 * timing.median / TIMED, 2), "speed": round(1 / timing.ratio, 2)}
        return rows

    def phenomena(self) -> list[dict[str, Any]]:
        """Over the blocks, the largest figures of each kind of linear."""
        kinds: dict[str, list[Phenomena]] = {}
        for name, figure in observe(self.prepared(QuantConfig()), self.calibration(0)).items():
            kinds.setdefault(name.rpartition(".")[2], []).append(figure)
        return [
            {"model": self.label, "input of": kind}
            | {key: round(max(figure.to_dict()[key] for figure in found), 1) for key in found[0].to_dict()}
            for kind, found in kinds.items()
        ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Against the rung: top-1 above, divergence from FP32 below; a column a model, a line a number of bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(
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
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="calibration sets to average over")
    parser.add_argument("--full", action="store_true", help="learn for as many epochs as the presets")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()

    started = time.perf_counter()
    epochs = FULL if options.full else SHORT
    subjects = [Subject(label) for label in MODELS]
    total = len(subjects) * len(epochs) * len(ladder(8, 1, 0)) * options.seeds
    rows: list[dict[str, Any]] = []
    with tqdm(total=total, desc="quantize and evaluate", unit="model") as bar:
        for subject in subjects:
            rows += subject.climb(options.seeds, epochs, bar)
    figures = [row for subject in subjects for row in subject.phenomena()]

    print(
        "\nTop-1 of 450 held-out digits; agreement is with the predictions of FP32; times are of the fused\n"
        f"models and FP32, side by side in this process, on {native.isa()} kernels.\n"
    )
    print(report.table(rows, COLUMNS))
    print("\nThe paper's three phenomena at the linears' inputs (largest over the blocks; 1 = none):\n")
    print(report.table(figures))
    facts = {"machine": benchmark.machine(), "seeds": options.seeds, "epochs": epochs, "images": IMAGES}
    report.write_json(options.output / "results.json", facts | {"rows": rows, "phenomena": figures})
    report.write_csv(options.output / "results.csv", rows)
    draw(rows, options.output / "results.png")
    names = ", ".join(f"results.{kind}" for kind in ("json", "csv", "png"))
    print(f"\nwrote {names} to {options.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
