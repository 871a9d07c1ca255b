"""Examples in docstrings run and print what they say."""

import doctest
import importlib

import pytest
import torch

MODULES = [
    "ptq4vm.api",
    "ptq4vm.authors.context",
    "ptq4vm.saving",
    "ptq4vm.config",
    "ptq4vm.data",
    "ptq4vm.evaluate",
    "ptq4vm.finite_checks",
    "ptq4vm.graph.pipeline",
    "ptq4vm.hub.metrics",
    "ptq4vm.hub.names",
    "ptq4vm.hub.recipe_words",
    "ptq4vm.inspection.layers",
    "ptq4vm.models",
    "ptq4vm.models.checkpoints",
    "ptq4vm.models.hierarchical",
    "ptq4vm.models.identify",
    "ptq4vm.models.local_vim",
    "ptq4vm.models.local_vmamba",
    "ptq4vm.models.mamba_vision",
    "ptq4vm.models.outliers",
    "ptq4vm.models.registry",
    "ptq4vm.models.replace",
    "ptq4vm.models.scan_order",
    "ptq4vm.models.vim",
    "ptq4vm.models.vmamba",
    "ptq4vm.onnx.library",
    "ptq4vm.passes.calibrate.callbacks",
    "ptq4vm.passes.lower.pipeline",
    "ptq4vm.passes.prepare.pipeline",
    "ptq4vm.formatting",
    "ptq4vm.quantization_specs",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    if name == "ptq4vm.data":
        pytest.importorskip("sklearn")
    torch.manual_seed(0)
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
