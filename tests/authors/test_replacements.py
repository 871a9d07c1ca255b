"""Installed extensions, seen as our operators while a model is captured."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from helpers.fake_packages import packages
from helpers.recurrence import drawn, recurrence

from ptq4vm import prepare
from ptq4vm.authors import extensions_replaced, stand_ins
from ptq4vm.authors.catalogue import STAND_INS
from ptq4vm.authors.replacements import replacements
from ptq4vm.graph.capture import capture

COMPILED = """
    def fwd(*inputs):
        raise RuntimeError("a compiled kernel got a tensor without memory")
    bwd = fwd
"""
INSTALLED = {
    "selective_scan_cuda.py": COMPILED,
    "causal_conv1d_cuda.py": COMPILED,
    "mamba_ssm/__init__.py": "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/selective_scan_interface.py": """
        import selective_scan_cuda
        def selective_scan_fn(*inputs, **options):
            return selective_scan_cuda.fwd(*inputs)
    """,
    "causal_conv1d/__init__.py": """
        def causal_conv1d_fn(*inputs, **options):
            raise RuntimeError("a compiled kernel got a tensor without memory")
    """,
}
USER = """
    import torch
    from torch import nn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as scan
    from causal_conv1d import causal_conv1d_fn
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj, self.conv = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 3))
            self.A = nn.Parameter(-torch.rand(4, 2))
            self.project = nn.Linear(4, 8)
        def forward(self, x):
            u = causal_conv1d_fn(self.in_proj(x).transpose(1, 2), self.conv, activation="silu")
            B, C, delta = self.project(u.transpose(1, 2)).transpose(1, 2).split([2, 2, 4], 1)
            return scan(u, delta, self.A, B, C, delta_softplus=True).transpose(1, 2)
"""


@pytest.fixture
def installed(tmp_path):
    """An installed mamba_ssm whose functions fail as compiled ones do on tensors without memory, and a user's file."""
    with packages(tmp_path, INSTALLED | {"user_model.py": USER}):
        yield importlib.import_module("user_model")


def test_there_is_nothing_to_replace_without_extensions():
    assert replacements() == {}
    with extensions_replaced():
        pass
    with stand_ins():
        import mamba_ssm  # noqa: F401
        import selective_scan_cuda  # noqa: F401

        assert replacements() == {}


def test_every_function_of_an_installed_package_is_found(installed):
    importlib.import_module("selective_scan_cuda")
    assert replacements() == {
        installed.scan: STAND_INS["mamba_ssm"]["selective_scan_fn"],
        installed.causal_conv1d_fn: STAND_INS["causal_conv1d"]["causal_conv1d_fn"],
        sys.modules["selective_scan_cuda"].fwd: STAND_INS["selective_scan_cuda"]["fwd"],
    }


def test_functions_are_replaced_by_whatever_name_a_module_holds_them(installed):
    theirs, module = installed.scan, ModuleType("another")
    module.found, module.unhashable = theirs, []
    sys.modules["another"] = module
    try:
        with extensions_replaced():
            ours = STAND_INS["mamba_ssm"]["selective_scan_fn"]
            assert installed.scan is module.found is sys.modules["mamba_ssm"].selective_scan_fn is ours
            u, delta, A, B, C, *_ = drawn(1)
            torch.testing.assert_close(
                sys.modules["selective_scan_cuda"].fwd(u, delta, A, B, C, None, None, None, False)[0],
                recurrence(u, delta, A, B, C),
            )
        assert installed.scan is module.found is sys.modules["mamba_ssm"].selective_scan_fn is theirs
        with pytest.raises(ZeroDivisionError), extensions_replaced():
            1 / 0  # noqa: B018
        assert installed.scan is theirs
    finally:
        del sys.modules["another"]


def test_a_captured_model_has_our_operators(installed):
    with extensions_replaced():
        gm = capture(installed.Mixer(), (torch.randn(2, 5, 4),))
    targets = {str(node.target) for node in gm.graph.nodes}
    assert {"ptq4vm.selective_scan.default", "ptq4vm.causal_conv1d.default"} <= targets


def test_prepare_sees_them_by_itself(installed):
    prepared = prepare(installed.Mixer().eval(), (torch.randn(2, 5, 4),))
    assert "ptq4vm.selective_scan.default" in {str(node.target) for node in prepared.graph.nodes}
