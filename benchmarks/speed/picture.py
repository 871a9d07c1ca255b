"""A picture of where the time goes: stacked bars, as the paper's Figure 3 has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.layers import Category
from ptq4vm.files import replace_file
from ptq4vm.optional_packages import pyplot, require

COLORS = {
    Category.LINEAR: "#2f6db3",
    Category.SCAN: "#e08a1e",
    Category.CONV: "#4c9f70",
    Category.NORM: "#8c6bb1",
    Category.LAYOUT: "#9e9e9e",
    Category.QUANTIZE: "#c8423c",
    Category.OTHER: "#d9d9d9",
}
SMALLEST = 0.04
"""Share of the highest bar from which a part has room for its label."""

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: str | Path) -> None:
    """Raises ValueError for the name of a file that is no picture, ImportError without matplotlib: before the work."""
    require("--picture", "plot", "matplotlib")
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"{path} is no picture: its name must end with {', '.join(FORMATS)}")


def draw(path: Path, title: str, panels: Sequence[tuple[str, Mapping[str, Mapping[Category, float]]]]) -> None:
    """A panel for each setting, in it a bar for each graph, in it a part for each category: seconds."""
    plot = pyplot()
    bars = max(len(graphs) for _, graphs in panels)
    size = (2 + 1.8 * bars * len(panels), 5.4)
    figure, axes = plot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (heading, graphs) in zip(axes[0], panels, strict=True):
        _panel(axis, heading, graphs)
    axes[0][0].set_ylabel("ms")
    shown = [kind for kind in Category if any(parts.get(kind, 0) for _, graphs in panels for parts in graphs.values())]
    handles = [plot.Rectangle((0, 0), 1, 1, color=COLORS[kind]) for kind in reversed(shown)]
    figure.legend(handles, [str(kind) for kind in reversed(shown)], loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=11)
    options: dict[str, Any] = {"dpi": 150, "format": path.suffix.removeprefix(".").lower()}
    try:
        replace_file(path, lambda temporary: figure.savefig(temporary, **options))
    finally:
        plot.close(figure)


def _panel(axis: Any, heading: str, graphs: Mapping[str, Mapping[Category, float]]) -> None:
    highest = max(sum(parts.values()) for parts in graphs.values())
    for place, parts in enumerate(graphs.values()):
        whole, bottom = sum(parts.values()), 0.0
        for kind in Category:
            seconds = parts.get(kind, 0.0)
            axis.bar(place, 1e3 * seconds, bottom=1e3 * bottom, color=COLORS[kind], width=0.72)
            if seconds > SMALLEST * highest:
                label = f"{_milliseconds(seconds)}, {seconds / whole:.0%}"
                light = kind in (Category.OTHER, Category.LAYOUT)
                color = "black" if light else "white"
                axis.text(place, 1e3 * (bottom + seconds / 2), label, ha="center", va="center", color=color, fontsize=8)
            bottom += seconds
        label = _milliseconds(whole)
        axis.text(place, 1e3 * bottom, label, ha="center", va="bottom", weight="bold", fontsize=9)
    axis.set_xticks(range(len(graphs)), list(graphs))
    axis.set_xlim(-0.6, len(graphs) - 0.4)
    axis.set_ylim(0, 1.08e3 * highest)
    axis.set_title(heading, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
