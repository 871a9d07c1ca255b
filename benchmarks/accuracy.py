"""How much accuracy each recipe costs: one row a (model, bits, recipe, seed).

    python benchmarks/accuracy.py run --data-dir cifar10                      # the rows of docs/results.md: hours
    python benchmarks/accuracy.py run --data-dir cifar10 --recipes ptq4vm best --bits 4 --models vmamba_micro_32
    python benchmarks/accuracy.py table                                       # mean and spread over the seeds
    python benchmarks/accuracy.py picture docs/accuracy.png                   # the same, to see

Rows are appended to `benchmarks/results/accuracy.jsonl`, each in one write; a run leaves out the rows that are there,
so it can be interrupted, and several may run at once with `--share 0/2` and `--share 1/2`. A row says the commit, the
torch, the kernels and the date it was measured with; a row of another number of test images is another row. Names of
recipes are those of `ptq4vm.config.RECIPES`, and of this file's ablations of `best`: `best-…` leaves one stage out,
`best+…` adds one. Rows of ablations that are gone, since they did not help, stay in the table.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import Subset
from tqdm import tqdm

import ptq4vm
import ptq4vm.models
from ptq4vm.backend import native
from ptq4vm.config import RECIPES, Factors, Granularity, Loss, Outputs, QuantConfig, State
from ptq4vm.data import calibration_batches, loader, open_dataset, transform_for
from ptq4vm.evaluate import evaluate, predictions
from ptq4vm.files import replace_file
from ptq4vm.metadata import metadata_of
from ptq4vm.models.outliers import inject_outliers
from ptq4vm.passes.prepare.pipeline import canonical_graph, prepared_from
from ptq4vm.report import model_bytes, table

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
MODELS = ("vim_micro_patch4_32", "local_vim_micro_patch4_32", "vmamba_micro_32", "local_vmamba_micro_32")
VARIANTS = ("plain", "hard")
KSCALED = ("state_naive", "state", "kscaled_naive", "kscaled_linears", "kscaled", "ptq4vm+state")
"""Recipes of the second paper, and the mix of both."""

LADDER = tuple(name for name in RECIPES if name not in ("best", *KSCALED))


def learns(**changes: Any) -> Callable[[QuantConfig], QuantConfig]:
    """A recipe with a part of its learning changed."""

    def change(config: QuantConfig) -> QuantConfig:
        assert config.learning is not None
        return dataclasses.replace(config, learning=dataclasses.replace(config.learning, **changes))

    return change


def with_(**changes: Any) -> Callable[[QuantConfig], QuantConfig]:
    return functools.partial(dataclasses.replace, **changes)


ABLATIONS: dict[str, Callable[[QuantConfig], QuantConfig]] = {
    "best-smoothing": with_(smoothing=None),
    "best-truncation": with_(range_search=False),
    "best-per_token": with_(granularity=Granularity.PER_TENSOR),
    "best-rotation": with_(rotation=False),
    "best-gptq": with_(gptq=False),
    "best-mirror": with_(mirror=False),
    "best-learning": with_(learning=None),
    "best-fisher": learns(loss=Loss.COSINE),
    "best+smooth_scales": learns(smooth_rate=1e-2),
    "best+out_proj_8bit": with_(eight_bit=("*.out_proj",)),
    "best+x_proj_dt_proj_8bit": with_(eight_bit=("*.x_proj*", "*.dt_proj*")),
    "minmax+class_token": with_(class_token_in_float=True),
    "kscaled-k_scaled": with_(outputs=Outputs(k_scaled=False)),
    "state+powers": with_(state=State(factors=Factors.POWERS)),
    "kscaled+powers": with_(state=State(factors=Factors.POWERS)),
    "kscaled-reparameterization": with_(state=State(factors=None)),
    "kscaled-integration": with_(state=State(integrate=False)),
}
"""Recipes with one thing less or more."""


def base_of(recipe: str) -> str:
    """What an ablation changes."""
    return re.split("[-+]", recipe)[0] if recipe in ABLATIONS else recipe


def config_of(recipe: str, bits: int, seed: int, epochs: int | None) -> QuantConfig:
    """A recipe or an ablation; `epochs` in place of the preset's."""
    config = QuantConfig.recipe(base_of(recipe), bits, seed=seed)
    if epochs is not None and config.learning is not None:
        config = learns(epochs=epochs)(config)
    return ABLATIONS[recipe](config) if recipe in ABLATIONS else config


class Subject:
    """A trained model, plain or hard, with its images and its own logits."""

    def __init__(self, name: str, variant: str, data_dir: str, test_images: int | None) -> None:
        self.model = timm.create_model(name, pretrained=True).eval()
        if variant == "hard":
            inject_outliers(self.model)
        transform = transform_for(self.model)
        self.train = open_dataset(data_dir, "train", transform)
        test: Any = open_dataset(data_dir, "test", transform, num_classes=self.model.num_classes)
        if test_images is not None and test_images < len(
            test
        ):  # from all over the split, whose folders are sorted by class
            test = Subset(test, [i * len(test) // test_images for i in range(test_images)])
        self.test = list(loader(test, 250))
        self.example = (self.test[0][0][:2],)
        self.graph = canonical_graph(self.model, self.example)
        self.logits = predictions(self.model, self.test)
        targets = torch.cat([classes for _, classes in self.test])
        self.top1 = 100 * (self.logits.argmax(1) == targets).double().mean().item()

    def evaluate(self, module: torch.nn.Module) -> Any:
        return evaluate(module, self.test, reference_predictions=self.logits, progress=False, check_finite=True)

    def row(self, config: QuantConfig, images: int) -> dict[str, Any]:
        """What quantizing with this config gives."""
        batches = calibration_batches(self.train, images, 32, config.seed)
        prepared = prepared_from(copy.deepcopy(self.graph), self.model, self.example, config)
        started = time.perf_counter()
        ptq4vm.calibrate(prepared, batches, progress=False)
        seconds = time.perf_counter() - started
        blocks = metadata_of(prepared).blocks
        quantized = ptq4vm.convert(prepared)
        found = self.evaluate(ptq4vm.fuse(quantized))
        return {
            **origin(),
            "date": datetime.now(UTC).date().isoformat(),
            "top1": round(found.top1, 3),
            "fp_top1": round(self.top1, 3),
            "loss": round(self.top1 - found.top1, 3),
            "agreement": round(found.agreement, 3),
            "divergence": found.divergence,
            "block_cosine": statistics.mean(block["cosine_loss"] for block in blocks if "cosine_loss" in block),
            "calibrate_s": round(seconds, 1),
            "bytes": model_bytes(quantized),
        }


KEYS = ("model", "variant", "bits", "recipe", "seed", "images", "epochs", "test_images")
"""What makes a row another one."""


@functools.cache
def origin() -> dict[str, str]:
    """Code, libraries and kernels that rows of this process are measured with."""
    return {"commit": commit(), "torch": torch.__version__, "kernels": native.isa()}


def commit() -> str:
    """That of the checkout, with a + where files in it differ; `unknown` outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
        return f"{git('rev-parse', '--short=12', 'HEAD').strip() or 'unknown'}{'+' if changed else ''}"
    except OSError:  # there is no git
        return "unknown"


def read(path: Path) -> list[dict[str, Any]]:
    """Whole lines; what an interrupted write left behind is no row."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Rows of old files may lack a key, and are of a number of test images that nobody knows then."""
    return tuple(row.get(key) for key in KEYS)


def append(path: Path, row: dict[str, Any]) -> None:
    """One write in append mode, which another process's rows do not mix with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    line = ("\n" if torn else "") + json.dumps(row) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def wanted(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows asked for, one seed of everything before the next seed."""
    share = re.fullmatch(r"(\d+)/(\d+)", options.share)
    if share is None or not int(share[1]) < int(share[2]):
        raise ValueError(f"--share must be i/n with 0 <= i < n, got {options.share!r}")
    index, count = int(share[1]), int(share[2])
    for turn, (model, variant) in enumerate(itertools.product(options.models, options.variants)):
        if turn % count == index:
            for seed, bits, recipe in itertools.product(range(options.seeds), options.bits, options.recipes):
                yield {
                    "model": model,
                    "variant": variant,
                    "bits": bits,
                    "recipe": recipe,
                    "seed": seed,
                    "images": options.images,
                    "epochs": options.epochs,
                    "test_images": options.test_images,
                }


def run(options: argparse.Namespace) -> None:
    done = {key_of(row) for row in read(options.output)}
    total = len(open_dataset(options.data_dir, "test", lambda image: image))
    rows = (row | {"test_images": min(row["test_images"] or total, total)} for row in wanted(options))
    missing = [row for row in rows if key_of(row) not in done]
    subject, owner = None, None
    for row in (bar := tqdm(missing, desc="quantize and evaluate", unit="model")):
        bar.set_postfix_str(f"{row['model']} {row['variant']} {row['recipe']} {row['bits']} bits, seed {row['seed']}")
        if owner != (row["model"], row["variant"]):
            subject = None  # not two at once
            subject = Subject(row["model"], row["variant"], options.data_dir, options.test_images)
            owner = row["model"], row["variant"]
        config = config_of(row["recipe"], row["bits"], row["seed"], row["epochs"])
        append(options.output, row | subject.row(config, row["images"]))


COLUMNS = {
    "model": "model",
    "variant": "version",
    "bits": "bits",
    "recipe": "recipe",
    "epochs": "epochs",
    "test_images": "test images",
    "seeds": "seeds",
    "top1": "top-1 %",
    "loss": "loss",
    "spread": "±",
    "agreement": "agree %",
    "divergence": "KL ·1000",
    "block_cosine": "cos loss ·1000",
    "calibrate_s": "calibrate s",
    "kilobytes": "kB",
}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds; the spread is half of what lies between the lowest and the highest loss."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in KEYS if key != "seed"), []).append(row)

    def mean(found: list[dict[str, Any]], key: str) -> float:
        return statistics.mean(row[key] for row in found)

    result = [
        {
            **{key: found[0].get(key) for key in ("model", "variant", "bits", "recipe", "epochs", "test_images")},
            "seeds": len(found),
            "top1": round(mean(found, "top1"), 2),
            "loss": round(mean(found, "loss"), 2),
            "spread": round((max(row["loss"] for row in found) - min(row["loss"] for row in found)) / 2, 2),
            "agreement": round(mean(found, "agreement"), 2),
            "divergence": round(1e3 * mean(found, "divergence"), 2),
            "block_cosine": round(1e3 * mean(found, "block_cosine"), 3),
            "calibrate_s": round(mean(found, "calibrate_s"), 1),
            "kilobytes": round(mean(found, "bytes") / 1e3),
        }
        for found in groups.values()
    ]
    return sorted(
        result, key=lambda row: (row["model"], row["variant"] != "plain", -row["bits"], place_of(row["recipe"]))
    )


def place_of(recipe: str) -> tuple[int, str]:
    """What recipes are sorted by: as they are listed here, then those that are gone."""
    name = recipe.split(",")[0]
    known = (*RECIPES, *ABLATIONS, name)
    return known.index(name), recipe


def cell(row: dict[str, Any]) -> str:
    """What a recipe costs one model; ¹ and ² are fewer seeds than three."""
    spread = f" ± {row['spread']:.2f}" if row["seeds"] > 1 else ""
    mark = {1: "¹", 2: "²"}.get(row["seeds"], "")
    return f"**{row['loss']:.2f}{spread}** · {row['agreement']:.1f} · {row['divergence']:.1f}{mark}"


def label(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The recipe, and how long it learned and on how many images it was tested where that differs among the rows."""
    text = row["recipe"]
    for key, word in (("epochs", "epochs"), ("test_images", "test images")):
        if len({other.get(key) for other in rows if other["recipe"] == row["recipe"]}) > 1:
            text += f", {row[key]} {word}"
    return text


def sections(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of one version and number of bits, with a heading."""
    for variant, bits in itertools.product(VARIANTS, sorted({row["bits"] for row in rows}, reverse=True)):
        those = [row for row in rows if (row["variant"], row["bits"]) == (variant, bits)]
        if those:
            yield f"W{bits}A{bits}, {variant}", those


def pivot(heading: str, models: list[str], cells: dict[tuple[str, str], str]) -> str:
    """Recipes by models."""
    lines = [[heading, *models], ["---"] * (1 + len(models))]
    recipes = sorted({recipe for recipe, _ in cells}, key=place_of)
    lines += [[f"`{recipe}`", *(cells.get((recipe, model), "–") for model in models)] for recipe in recipes]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(rows: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """What leaving a stage out of a recipe adds to KL · 1000: the mean of the differences by seed, and their range."""
    seeds = {
        tuple(row.get(key) for key in ("recipe", "model", "seed", "images", "epochs", "test_images")): 1e3
        * row["divergence"]
        for row in rows
    }
    found: dict[tuple[str, str], list[float]] = {}
    for (recipe, model, *run), divergence in seeds.items():
        base = base_of(recipe)
        whole = seeds.get((base, model, *run))
        if recipe.startswith(f"{base}-") and whole is not None:
            found.setdefault((recipe, model), []).append(divergence - whole)
    return {
        key: f"{statistics.mean(values):+.1f} ({min(values):+.1f} … {max(values):+.1f})"
        for key, values in found.items()
        if len(values) > 2
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Loss ± spread · agreement · KL · 1000, by version and bits, and what a stage of `best` is worth."""
    models = list(dict.fromkeys(row["model"] for row in sorted(rows, key=lambda row: row["model"])))
    tables = [
        pivot(heading, models, {(label(row, those), row["model"]): cell(row) for row in summary(those)})
        for heading, those in sections(rows)
    ]
    for heading, those in sections(rows):
        if left_out := differences(those):
            tables.append(pivot(f"{heading}: KL · 1000 more without it", models, left_out))
    return "\n\n".join(tables)


DRAWN = ("minmax", "smoothquant", "pts", "pts+truncation", "ptq4vm_released", "ptq4vm", "best")


def drawn(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Means of W4A4 by version, model and recipe; of one that learned for several times the shortest."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in sorted(summary(rows), key=lambda row: row["epochs"] or 0):
        if row["bits"] == 4:
            found.setdefault((row["variant"], row["model"], row["recipe"]), row)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """W4A4 against the recipe: points lost above, divergence below; a column a version, a line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = drawn(rows)
    models = sorted({model for _, model, _ in found})
    figure, axes = pyplot.subplots(2, len(VARIANTS), figsize=(12, 7.5), sharex=True, sharey="row")
    for column, variant in zip(axes.T, VARIANTS, strict=True):
        for model in models:
            line = [
                (x, found[variant, model, recipe])
                for x, recipe in enumerate(DRAWN)
                if (variant, model, recipe) in found
            ]
            places = [x for x, _ in line]
            loss, spread = [row["loss"] for _, row in line], [row["spread"] for _, row in line]
            column[0].errorbar(places, loss, spread, marker="o", capsize=3, label=model)
            column[1].plot(places, [row["divergence"] / 1e3 for _, row in line], marker="o", label=model)
        column[0].set_title(f"W4A4, {variant}")
        column[1].set_xticks(range(len(DRAWN)), DRAWN, rotation=30, ha="right")
        for axis in column:
            axis.set_yscale("log")
            axis.grid(axis="y", alpha=0.3)
    axes[0][0].legend()
    axes[0][0].set_ylabel("points of top-1 lost")
    axes[1][0].set_ylabel("KL divergence from FP32, nats")
    figure.tight_layout()
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="quantize and evaluate what is missing")
    runner.add_argument("--data-dir", required=True, help="train/<class>/* and test/<class>/*")
    runner.add_argument("--models", nargs="+", default=MODELS)
    runner.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    runner.add_argument("--bits", nargs="+", type=int, default=(8, 6, 4))
    runner.add_argument("--recipes", nargs="+", default=(*LADDER, "best"), choices=(*RECIPES, *ABLATIONS))
    runner.add_argument("--seeds", type=int, default=3)
    runner.add_argument("--images", type=int, default=128, help="calibration images (the paper takes 256)")
    runner.add_argument("--epochs", type=int, help="of learning, in place of the preset's")
    runner.add_argument("--test-images", type=int, help="of the test split, in place of all")
    runner.add_argument("--share", default="0/1", help="i/n: every n-th model and version, beginning with the i-th")
    printer = commands.add_parser("table", help="mean and spread over the seeds")
    printer.add_argument("--markdown", action="store_true")
    drawer = commands.add_parser("picture", help="loss and divergence against the recipe, as PNG")
    drawer.add_argument("path", type=Path)
    for command in (runner, printer, drawer):
        command.add_argument("--output", type=Path, default=RESULTS)
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.command == "run":
        run(options)
    rows = read(options.output)
    if options.command == "picture":
        return draw(rows, options.path)
    print(markdown(rows) if options.command == "table" and options.markdown else table(summary(rows), COLUMNS))


if __name__ == "__main__":
    main()
