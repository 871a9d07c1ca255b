"""The context in which the authors' CUDA extensions resolve to this package's operators."""

import contextlib
import importlib
import sys
import unittest.mock
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from ptq4vm.authors.finder import StandInFinder, absent_packages


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Lets code import `mamba_ssm`, `causal_conv1d`, `selective_scan_cuda*` and their kin without having them.

    Import the authors' code and build the model inside; keep the context open for as long as the model's forward
    imports more. The model stays usable outside. Packages that are whole are left alone: an extension that is installed
    and loads is the one that is imported. Python files of a package without its extension, such as a fork of mamba_ssm
    on `sys.path`, are used; the parts of it that need the extension or Triton are stood in for. On exit the stand-ins,
    and what was imported from such packages, leave `sys.modules`. Contexts may be nested. Inside,
    `torch.cuda.device` of a CPU's device does nothing, instead of failing.

    Raises:
        NotImplementedError: inside, where the code calls what is not covered, such as Mamba-2; it names the function.

    Example:
        >>> import torch
        >>> with stand_ins():
        ...     from mamba_ssm import Mamba
        >>> Mamba(d_model=8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """
    if any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        yield
        return
    before = _modules(absent := absent_packages())
    for name in before:
        del sys.modules[name]
    finder = StandInFinder(absent)
    sys.meta_path.insert(0, finder)
    importlib.invalidate_caches()
    try:
        with devices_of_cpus():
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in _modules(absent):
            del sys.modules[name]
        sys.modules.update(before)


def _modules(packages: frozenset[str]) -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}


_initialize_device = torch.cuda.device.__init__


def _open_device(self: torch.cuda.device, device: Any) -> None:
    on_cpu = isinstance(device, torch.device | str) and torch.device(device).type == "cpu"
    _initialize_device(self, -1 if on_cpu else device)


@contextlib.contextmanager
def devices_of_cpus() -> Iterator[None]:
    """Lets `torch.cuda.device` of a CPU's device do nothing, where torch raises: VMamba opens that of its input."""
    with unittest.mock.patch.object(torch.cuda.device, "__init__", _open_device):
        yield
