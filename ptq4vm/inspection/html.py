"""Writes one HTML file with the table and the figures of all linears, which needs no network and no library."""

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_max_pool1d

from ptq4vm.files import replace_file
from ptq4vm.inspection.layers import Layer, Report
from ptq4vm.inspection.statistics import PERCENTILES

TEMPLATE = Path(__file__).with_name("page.html")
POINTS = 256
"""Largest number of points of a line."""
DIGITS = 4
"""Significant digits of the numbers in figures."""


def write_page(report: Report, path: Path) -> Path:
    """Writes the page, which holds its contents as JSON under the id `data`."""
    # no "<", so that no name can end the script
    data = json.dumps(_content(report), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(report.title), 1).replace("{{data}}", data, 1)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def _content(report: Report) -> dict[str, Any]:
    columns = {key: title for key, title in report.columns.items() if any(row[key] is not None for row in report.rows)}
    return {
        "title": report.title,
        "facts": list(report.facts.items()),
        "columns": list(columns.items()),
        "rows": [{key: row[key] for key in columns} for row in report.rows],
        "percentiles": PERCENTILES,
        "linears": {layer.name: _figures(layer) for layer in report.layers},
    }


def _figures(layer: Layer) -> dict[str, Any]:
    activation = layer.activation
    assert activation is not None
    return {
        "tokens": activation.tokens,
        "channels": activation.channels,
        "images": activation.images,
        "surfaces": [_surface(name, values) for name, values in activation.surfaces().items()],
        "lines": {"token": _lines(activation.token_lines()), "channel": _lines(activation.channel_lines())},
        "bands": [{"name": name, "values": _numbers(values)} for name, values in activation.bands().items()],
    }


def _surface(name: str, values: Tensor) -> dict[str, Any]:
    """Returns heights as bytes, 255 for the highest."""
    highest = float(values.max())
    heights = (values * (255 / highest if highest > 0 else 0)).round().to(torch.uint8)
    data = base64.b64encode(heights.contiguous().numpy().tobytes()).decode("ascii")
    return {"name": name, "shape": list(values.shape), "highest": highest, "heights": data}


def _lines(lines: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [{"name": name, "values": _numbers(_shorter(name, values))} for name, values in lines.items()]


def _shorter(name: str, values: Tensor) -> Tensor:
    """Shortens a line to `POINTS`; a point that stands for several has their maximum, or their mean."""
    if len(values) <= POINTS:
        return values
    pool = adaptive_max_pool1d if name.startswith("max") else adaptive_avg_pool1d
    return pool(values[None], POINTS)[0]


def _numbers(values: Tensor) -> Any:
    if values.dim() > 1:
        return [_numbers(row) for row in values]
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
