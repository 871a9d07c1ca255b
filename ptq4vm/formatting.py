"""Writes results as aligned text, JSON and CSV, and describes the linears of a lowered graph."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.files import replace_file
from ptq4vm.graph.insert import attribute
from ptq4vm.metadata import Coverage, ProductMetadata, metadata_of
from ptq4vm.passes.lower.patterns import source_of
from ptq4vm.terminal_text import escaped

Row = Mapping[str, Any]


def table(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> str:
    """Returns rows as aligned text, numbers to the right.

    Args:
        rows: values by key.
        columns: headings by the keys to show; None shows all keys.

    Example:
        >>> print(table([{"name": "a", "bits": 4}, {"name": "bc", "bits": 8}]))
        name  bits
        ----  ----
        a        4
        bc       8
    """
    columns = columns or {key: key for key in _keys(rows)}
    cells = [list(map(escaped, columns.values()))] + [[_text(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row.get(key), Real | None) for row in rows) for key in columns]
    lines = (
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in [cells[0], ["-" * width for width in widths], *cells[1:]]
    )
    return "\n".join(line.rstrip() for line in lines)


def mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.2f} MiB"


def to_json(value: Any) -> str:
    """Returns strict JSON: null for NaN and infinity, and no raw control characters."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON; a file that exists is replaced only once the new one is complete."""
    text = to_json(value) + "\n"
    replace_file(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes one line per row under the keys of all rows, and replaces files as `write_json` does."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _keys(rows), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    replace_file(Path(path), write)


def linear_rows(quantized: GraphModule) -> list[dict[str, Any]]:
    """Returns shape, bits and scales of each integer linear; scales and smoothing are None where there are none."""
    metadata = metadata_of(quantized)
    facts = {linear.name: linear for linear in metadata.linears}
    rows = []
    for node in quantized.graph.find_nodes(op="call_function", target=ops.linear.default):
        codes, scale, _, weight = node.args[:4]
        name = str(weight.target).removesuffix(".weight_q")
        integers = attribute(quantized, weight.target)
        input_scale, inv_smooth = _constant(quantized, scale), _constant(quantized, source_of(codes).inv_smooth)
        smooth = None if inv_smooth is None else inv_smooth.reciprocal()
        rows.append(
            {
                "name": name,
                "tokens": facts[name].tokens,
                "in": facts[name].in_features,
                "out": facts[name].out_features,
                "weight_bits": metadata.config.weight(name).bits,
                "activation_bits": metadata.config.activation(name).bits,
                "granularity": str(metadata.config.activations.granularity),
                "weight_bytes": integers.numel() * integers.element_size(),
            }
            | _range("input_scale", input_scale)
            | _range("smooth", smooth)
        )
    return rows


def _range(name: str, values: Tensor | None) -> dict[str, float | None]:
    low, high = (None, None) if values is None else (values.min().item(), values.max().item())
    return {f"{name}_min": low, f"{name}_max": high}


MOST_NAMED = 3
"""Products left for one reason that a line names before it counts the others."""


def coverage_line(coverage: Coverage) -> str:
    """Returns which share of a model's products of weights is quantized, and what is left and why.

    Example:
        >>> from ptq4vm.metadata import Coverage, ProductMetadata
        >>> head = ProductMetadata(name="fc", multiply_adds=10, left="head")
        >>> coverage_line(Coverage(products=(ProductMetadata(name="fc1", multiply_adds=30), head)))
        'quantizes 1 of 2 products of weights (75.0 % of multiply-adds); left: fc because head'
    """
    left = [product for product in coverage.products if product.left is not None]
    count, whole = len(coverage.products), _work(coverage.products)
    share = _percent(whole - _work(left), whole)
    parts = [f"quantizes {count - len(left)} of {count} products of weights ({share} of multiply-adds)"]
    if left:
        reasons = dict.fromkeys(product.left for product in left)
        names = {reason: [product.name for product in left if product.left == reason] for reason in reasons}
        parts += ["left: " + ", ".join(f"{_some(found)} because {reason}" for reason, found in names.items())]
    floats = [product for product in coverage.convolutions if product.left is not None]
    if floats:
        share = _percent(_work(floats), whole + _work(coverage.convolutions))
        word, stay = ("convolution", "stays") if len(floats) == 1 else ("convolutions", "stay")
        parts += [f"{len(floats)} {word} of neighbours ({share} of all multiply-adds) {stay} in floating point"]
    return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _work(products: Sequence[ProductMetadata]) -> int:
    return sum(product.multiply_adds for product in products)


def _percent(part: int, whole: int) -> str:
    """Returns a share in tenths of a percent, rounded down, so that 100 % means all."""
    return f"{1000 * part // max(1, whole) / 10:.1f} %"


def model_bytes(module: nn.Module) -> int:
    """Returns the bytes of all parameters and buffers, each counted once."""
    tensors = chain(module.parameters(), module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _constant(gm: GraphModule, node: Any) -> Tensor | None:
    constant = isinstance(node, Node) and node.op == "get_attr"
    return attribute(gm, str(node.target)) if constant else None


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, Real):
        return escaped(str(value))
    large = isinstance(value, int) or abs(value) >= 1000  # type: ignore[operator]
    return f"{value:,.0f}" if large else f"{value:.4g}"
