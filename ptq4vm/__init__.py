"""Post-training quantization of Visual Mamba: prepare, calibrate, convert.

    prepared = ptq4vm.prepare(model, example_inputs=(images,), config=ptq4vm.QuantConfig.w4a4())
    ptq4vm.calibrate(prepared, loader)
    quantized = ptq4vm.convert(prepared)

Importing loads nothing but this file; each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq4vm import authors as authors
    from ptq4vm import onnx as onnx
    from ptq4vm.api import calibrate, convert, fuse, prepare, quantize
    from ptq4vm.config import QuantConfig
    from ptq4vm.finite_checks import check_finite
    from ptq4vm.hub.push import push_to_hub
    from ptq4vm.passes.calibrate.callbacks import CalibrationCallback
    from ptq4vm.quantization_specs import (
        ActivationSpec,
        Granularity,
        Learning,
        OutputQuantization,
        StateQuantization,
        WeightSpec,
    )
    from ptq4vm.saving import load, save

__version__ = "0.1.0"

_MODULES = {
    "api": ("prepare", "calibrate", "convert", "fuse", "quantize"),
    "saving": ("save", "load"),
    "config": ("QuantConfig",),
    "finite_checks": ("check_finite",),
    "hub.push": ("push_to_hub",),
    "passes.calibrate.callbacks": ("CalibrationCallback",),
    "quantization_specs": (
        "ActivationSpec",
        "Granularity",
        "Learning",
        "OutputQuantization",
        "StateQuantization",
        "WeightSpec",
    ),
}
_PACKAGES = ("authors", "onnx")
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ActivationSpec",
    "CalibrationCallback",
    "Granularity",
    "Learning",
    "OutputQuantization",
    "QuantConfig",
    "StateQuantization",
    "WeightSpec",
    "calibrate",
    "check_finite",
    "convert",
    "fuse",
    "load",
    "prepare",
    "push_to_hub",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"ptq4vm.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ptq4vm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ptq4vm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})
