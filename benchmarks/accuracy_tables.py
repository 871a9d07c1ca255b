"""Rows of benchmarks/accuracy.py as tables and as a picture: means and spreads over the seeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.recipes import ABLATIONS, base_of
from ptq4vm.files import replace_file
from ptq4vm.optional_packages import pyplot
from ptq4vm.recipes import RECIPES

VARIANTS = ("plain", "hard")
KEYS = ("model", "variant", "bits", "recipe", "seed", "images", "epochs", "test_images")
"""Two rows that differ in one of these are two measurements."""

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
    """Sorts recipes as they are listed, and after them chosen that are gone."""
    name = recipe.split(",")[0]
    known = (*RECIPES, *ABLATIONS, name)
    return known.index(name), recipe


def cell(row: dict[str, Any]) -> str:
    """Shows a recipe's cost for one model; ¹ and ² are fewer seeds than three."""
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
        chosen = [row for row in rows if (row["variant"], row["bits"]) == (variant, bits)]
        if chosen:
            yield f"W{bits}A{bits}, {variant}", chosen


def pivot(heading: str, models: list[str], cells: dict[tuple[str, str], str]) -> str:
    """Recipes by models."""
    lines = [[heading, *models], ["---"] * (1 + len(models))]
    recipes = sorted({recipe for recipe, _ in cells}, key=place_of)
    lines += [[f"`{recipe}`", *(cells.get((recipe, model), "–") for model in models)] for recipe in recipes]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(rows: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Differences of KL · 1000 that leaving a stage out of a recipe makes: their mean over the seeds, and range."""
    seeds: dict[tuple[Any, ...], float] = {
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
    """Loss ± spread · agreement · KL · 1000, by version and bits, and the worth of each stage of `best`."""
    models = list(dict.fromkeys(row["model"] for row in sorted(rows, key=lambda row: row["model"])))
    tables = [
        pivot(heading, models, {(label(row, chosen), row["model"]): cell(row) for row in summary(chosen)})
        for heading, chosen in sections(rows)
    ]
    for heading, chosen in sections(rows):
        if left_out := differences(chosen):
            tables.append(pivot(f"{heading}: KL · 1000 more without it", models, left_out))
    return "\n\n".join(tables)


DRAWN = ("minmax", "smoothquant", "pts", "pts+truncation", "ptq4vm_released", "ptq4vm", "best")


def drawn(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Means of W4A4 by version, model and recipe; the shortest learning where there are several."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in sorted(summary(rows), key=lambda row: row["epochs"] or 0):
        if row["bits"] == 4:
            found.setdefault((row["variant"], row["model"], row["recipe"]), row)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """W4A4 against the recipe: points lost above, divergence below; a column a version, a line a model."""
    plot = pyplot()
    found = drawn(rows)
    models = sorted({model for _, model, _ in found})
    figure, axes = plot.subplots(2, len(VARIANTS), figsize=(12, 7.5), sharex=True, sharey="row")
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
    plot.close(figure)
