"""Figures of a model, as a caller or `ptq4vm evaluate --json` gives them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

PERCENT = ("top1", "top5", "agreement")
RELATIVE = ("agreement", "divergence", "nonfinite")
"""Figures that say nothing of the model alone."""

_NAMES = {
    "top1": "Top-1 accuracy (%)",
    "top5": "Top-5 accuracy (%)",
    "agreement": "Images with the first class of the floating-point model (%)",
    "divergence": "KL divergence from the floating-point model (nats)",
    "loss": "Cross-entropy (nats)",
    "nonfinite": "Images with results that are not finite",
}
_FLOAT = ("float_", "reference_")
"""What the keys of the floating-point model's figures begin with."""
_WORDS = ("dataset", "split", "task")
_LEFT_OUT = ("model", "against", "seconds")
"""What `evaluate` says of the machine and of its command, and not of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of the quantized model and of the floating-point one; None where it is unknown."""

    key: str
    quantized: float | None = None
    floating: float | None = None

    @property
    def name(self) -> str:
        return _NAMES.get(self.key, self.key.replace("_", " "))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Figures, and what they were measured on; None for what is unknown."""

    figures: tuple[Figure, ...] = ()
    images: int | None = None
    dataset: str | None = None
    split: str | None = None
    task: str | None = None


def read_metrics(values: Mapping[str, Any] | None, dataset: str | None = None) -> Metrics:
    """Returns the figures of a mapping; raises ValueError that names the key of what is none.

    Args:
        values: numbers by name, those of the floating-point model under `float_NAME`; percentages for `top1` and
            `top5`. Words under `dataset`, `split` and `task`. None is left out.
        dataset: the dataset where the mapping names none.

    Example:
        >>> read_metrics({"top1": 75.5, "float_top1": 76.1}).figures
        (Figure(key='top1', quantized=75.5, floating=76.1),)
    """
    known = {key: value for key, value in (values or {}).items() if value is not None and key not in _LEFT_OUT}
    words = {key: _word(key, known.pop(key)) for key in _WORDS if key in known}
    images = known.pop("images", None)
    if known.get("nonfinite") == 0:
        del known["nonfinite"]
    numbers = {key: _number(key, value) for key, value in known.items()}
    if images is not None and (not isinstance(images, int) or isinstance(images, bool) or images < 1):
        raise ValueError(f"metrics: images is a count, got {images!r:.40}")
    keys = dict.fromkeys(_bare(key) for key in numbers)
    figures = tuple(Figure(key=key, quantized=numbers.get(key), floating=_floating(numbers, key)) for key in keys)
    classifies = any(figure.key in ("top1", "top5") for figure in figures)
    task = words.get("task", "image-classification" if classifies else None)
    dataset, split = words.get("dataset", dataset), words.get("split")
    return Metrics(figures=figures, images=images, dataset=dataset, split=split, task=task)


def _bare(key: str) -> str:
    return next((key.removeprefix(start) for start in _FLOAT if key.startswith(start)), key)


def _floating(numbers: Mapping[str, float], key: str) -> float | None:
    return next((numbers[start + key] for start in _FLOAT if start + key in numbers), None)


def _word(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"metrics: {key} is a text, got {value!r:.40}")
    return " ".join(value.split())


def _number(key: Any, value: Any) -> float:
    if not isinstance(key, str):
        raise ValueError(f"metrics: names of figures are texts, got {key!r:.40}")
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"metrics: {key} is a finite number, got {value!r:.40}")
    number = float(value)
    if _bare(key) in PERCENT and not 0 <= number <= 100:
        raise ValueError(f"metrics: {key} is in percent, from 0 to 100, got {number}")
    return number
