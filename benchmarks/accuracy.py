"""Measures the accuracy that each recipe costs: one row a (model, bits, recipe, seed).

    python benchmarks/accuracy.py run --data-dir cifar10                      # the rows of docs/results.md: hours
    python benchmarks/accuracy.py run --data-dir cifar10 --recipes ptq4vm best --bits 4 --models vmamba_micro_32
    python benchmarks/accuracy.py table                                       # mean and spread over the seeds
    python benchmarks/accuracy.py picture docs/accuracy.png                   # the same, to see

Rows are appended to `benchmarks/results/accuracy.jsonl`, each in one write; a run leaves out the rows that are there,
so it can be interrupted, and several may run at once with `--share 0/2` and `--share 1/2`. A row says the commit, the
torch, the kernels and the date it was measured with; a row of another number of test images is another row. Recipes
are named in `ptq4vm.config.RECIPES`, ablations in `benchmarks/recipes.py`: `best-…` leaves one stage out, `best+…`
adds one. Rows of ablations that are gone, since they did not help, stay in the table.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the script runs without an editable install too

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from benchmarks.accuracy_tables import COLUMNS, KEYS, VARIANTS, draw, markdown, summary
from benchmarks.recipes import ABLATIONS, LADDER, config_of
from benchmarks.subject import Subject
from ptq4vm.backend import native
from ptq4vm.config import QuantConfig
from ptq4vm.data import open_dataset
from ptq4vm.formatting import model_bytes, table
from ptq4vm.models.outliers import inject_outliers
from ptq4vm.recipes import RECIPES

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
MODELS = ("vim_micro_patch4_32", "local_vim_micro_patch4_32", "vmamba_micro_32", "local_vmamba_micro_32")


def subject_of(name: str, variant: str, data_dir: str, test_images: int | None) -> Subject:
    """A bundled model, as it is or made hard to quantize."""
    model = timm.create_model(name, pretrained=True).eval()
    if variant == "hard":
        inject_outliers(model)
    return Subject(model, data_dir, test_images=test_images)


def measured(subject: Subject, config: QuantConfig, images: int) -> dict[str, Any]:
    """Figures of one config, with their origin."""
    found = subject.quantize(config, images, fused=True)
    assert found.evaluation.agreement is not None
    return {
        **origin(),
        "date": datetime.now(UTC).date().isoformat(),
        "top1": round(found.evaluation.top1, 3),
        "fp_top1": round(subject.top1, 3),
        "loss": round(subject.top1 - found.evaluation.top1, 3),
        "agreement": round(found.evaluation.agreement, 3),
        "divergence": found.evaluation.divergence,
        "block_cosine": statistics.mean(block["cosine_loss"] for block in found.blocks if "cosine_loss" in block),
        "calibrate_s": round(found.seconds, 1),
        "bytes": model_bytes(found.quantized),
    }


@functools.cache
def origin() -> dict[str, str]:
    """Code, libraries and kernels that rows of this process are measured with."""
    return {"commit": commit(), "torch": torch.__version__, "kernels": native.isa()}


def commit() -> str:
    """The commit of the checkout, with a + where files in it differ; `unknown` outside of one."""

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
    subject: Any = None
    owner: tuple[str, str] | None = None
    for row in (bar := tqdm(missing, desc="quantize and evaluate", unit="model")):
        bar.set_postfix_str(f"{row['model']} {row['variant']} {row['recipe']} {row['bits']} bits, seed {row['seed']}")
        if owner != (row["model"], row["variant"]):
            subject = None  # not two at once
            subject = subject_of(row["model"], row["variant"], options.data_dir, options.test_images)
            owner = row["model"], row["variant"]
        config = config_of(row["recipe"], row["bits"], row["seed"], row["epochs"])
        append(options.output, row | measured(subject, config, row["images"]))


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
