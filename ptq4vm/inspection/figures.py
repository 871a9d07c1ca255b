"""Draws the paper's figures as PNG: token × channel surfaces, their margins, and percentile bands."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4vm.files import replace_file
from ptq4vm.inspection.layers import COLUMNS, Layer, Report
from ptq4vm.inspection.statistics import PERCENTILES, Activation
from ptq4vm.optional_packages import pyplot

BEFORE, AFTER = "#2f6db3", "#c8423c"
COLORS = {"max|x|": "#2f6db3", "mean|x|": "#e08a1e", "max|x / s|": "#4c9f70"}
OVERVIEW = (("output_sqnr_db", "#c8423c"), ("input_sqnr_db", "#2f6db3"), ("weight_sqnr_db", "#4c9f70"))
DIFFICULTY = (("peak", "#c8423c"), ("channel_outliers", "#2f6db3"), ("token_variance", "#4c9f70"))
ABOVE: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
"""Place of a legend where no curve hides it."""
MAX_NAMES = 72
"""Largest number of names on the axis of the overview."""


def draw(report: Report, folder: Path, count: int) -> list[Path]:
    """Draws `overview.png`, and one picture for each of the `count` worst linears; returns their paths."""
    worst = [str(row["name"]) for row in report.rows[:count]]
    layers = {layer.name: layer for layer in report.layers}
    paths = [folder / "overview.png", *(folder / (re.sub(r"[^\w.@-]", "_", name) + ".png") for name in worst)]
    _save(_overview(report), paths[0])
    for name, path in zip(worst, paths[1:], strict=True):
        _save(_linear(layers[name]), path)
    return paths


def _save(figure: Any, path: Path) -> None:
    try:
        replace_file(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    finally:
        pyplot().close(figure)


def _overview(report: Report) -> Any:
    """Draws the figures of every linear, in graph order."""
    rows = {row["name"]: row for row in report.rows}
    names = [layer.name for layer in report.layers]
    quantized = "input_sqnr_db" in report.rows[0]
    width = min(24, 3 + 0.22 * len(names))
    figure, axis = pyplot().subplots(figsize=(max(7, width), 5.5), layout="constrained")
    for key, color in OVERVIEW if quantized else DIFFICULTY:
        if key in report.rows[0]:
            heights = [float("nan") if rows[name][key] is None else rows[name][key] for name in names]
            label = COLUMNS[key].removesuffix(" dB")
            axis.plot(range(len(names)), heights, color=color, marker="o", markersize=3, linewidth=1, label=label)
    step = -(-len(names) // MAX_NAMES)
    axis.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=7)
    axis.set_xlim(-0.7, len(names) - 0.3)
    if quantized:
        axis.set_ylabel("SQNR, dB (higher is better)")
    else:
        axis.set_yscale("log")
        axis.set_ylabel("ratio (1 = easy to quantize)")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=3, **ABOVE)
    axis.set_title(report.title, fontsize=11, loc="left")
    return figure


def _linear(layer: Layer) -> Any:
    """Draws surfaces in the first row, their maxima and means in the second, percentiles in the third."""
    activation = layer.activation
    assert activation is not None
    surfaces, bands = activation.surfaces(), activation.bands()
    figure = pyplot().figure(figsize=(4.6 * max(2.6, len(surfaces)), 11.5), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1.5, 1, 1))
    # x before smoothing, if there is any, has its own scale
    alike = [float(values.max()) for values in surfaces.values()][len(surfaces) > 2 :]
    axes = top.subplots(1, len(surfaces), squeeze=False, subplot_kw={"projection": "3d"})[0]
    for axis, (name, values) in zip(axes, surfaces.items(), strict=True):
        own = len(surfaces) > 2 and axis is axes[0]
        _surface(axis, name, values, activation, float(values.max()) if own else max(alike))
    left, right = middle.subplots(1, 2)
    _lines(left, "token", activation.token_lines())
    _lines(right, "channel", activation.channel_lines())
    axes = bottom.subplots(1, len(bands), squeeze=False, sharey=True)[0]
    for axis, color, (name, values) in zip(axes, (BEFORE, AFTER), bands.items(), strict=False):
        _bands(axis, name, values, activation, color)
    sqnr = "" if layer.input.sqnr is None else f", SQNR {layer.input.sqnr:.1f} dB"
    figure.suptitle(f"input of {layer.name}, {activation.images} images{sqnr}", fontsize=11)
    return figure


def _surface(axis: Any, name: str, values: Tensor, activation: Activation, highest: float) -> None:
    values = values.expand(max(2, values.shape[0]), max(2, values.shape[1]))  # one row is drawn as two equal ones
    rows, columns = values.shape
    tokens = torch.linspace(0, max(1, activation.tokens - 1), rows).unsqueeze(-1).expand(-1, columns)
    channels = torch.linspace(0, max(1, activation.channels - 1), columns).expand(rows, -1)
    grid = (channels.numpy(), tokens.numpy(), values.numpy())
    options = {"cmap": "viridis", "vmin": 0, "linewidth": 0, "antialiased": False}
    axis.plot_surface(*grid, rcount=rows, ccount=columns, **options)
    axis.set_xlabel("channel")
    axis.set_ylabel("token")
    axis.set_zlim(0, highest or 1)
    axis.set_title(f"mean over images, {name}", fontsize=9)
    axis.view_init(elev=32, azim=-58)
    axis.tick_params(labelsize=7)
    for direction in (axis.xaxis, axis.yaxis):
        direction.get_major_locator().set_params(integer=True)


def _lines(axis: Any, name: str, lines: Mapping[str, Tensor]) -> None:
    for label, values in lines.items():
        axis.plot(values.numpy(), color=COLORS[label], linewidth=1, label=label)
    axis.set_yscale("log")
    _finish(axis, name, f"|x| over {'channels' if name == 'token' else 'tokens'} and images")


def _bands(axis: Any, name: str, values: Tensor, activation: Activation, color: str) -> None:
    groups = values.shape[1]
    places = [group * activation.tokens / groups for group in range(groups)]
    for share, alpha in enumerate((0.18, 0.4, 0.75)):
        low, high = values[share].numpy(), values[-1 - share].numpy()
        label = f"{PERCENTILES[share]} to {PERCENTILES[-1 - share]} %"
        axis.fill_between(places, low, high, color=color, alpha=alpha, linewidth=0, label=label)
    axis.plot(places, values[3].numpy(), color="black", linewidth=0.8, label="median")
    _finish(axis, "token", f"percentiles, {name}")


def _finish(axis: Any, name: str, title: str) -> None:
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel(name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.margins(x=0.01)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7, ncols=4, **ABOVE)
