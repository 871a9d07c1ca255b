"""The finder on `sys.meta_path` that makes stand-ins where a package, or what it needs, is absent."""

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from ptq4vm.authors.catalogue import EXTENSIONS, NEEDS_EXTENSION, STAND_INS

log = logging.getLogger(__name__)


def absent_packages() -> frozenset[str]:
    """Returns the packages of the table that are not installed, or whose compiled module cannot be imported."""
    whole = {module: _is_importable(module) for module in set(EXTENSIONS.values())}
    return frozenset(package for package, module in EXTENSIONS.items() if not whole[module])


def _is_importable(name: str) -> bool:
    """Whether a module is there and loads; a folder of that name without Python files is none."""
    try:
        return getattr(importlib.import_module(name), "__file__", None) is not None
    except Exception as error:  # a library that does not load raises what it likes
        log.debug("%s is stood in for: %s", name, error)
        return False


class StandInFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of absent packages: Python files that need no extension, else stand-ins."""

    def __init__(self, absent: frozenset[str]) -> None:
        self.absent = absent

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.absent:
            return None
        replaced = any(fullname == name or fullname.startswith(f"{name}.") for name in NEEDS_EXTENSION)
        real = None if replaced else self._real_spec(fullname, path, target)
        names = STAND_INS.get(fullname)
        if names is None:
            if real is None:
                raise ModuleNotFoundError(_not_covered(fullname))  # without `name`: `from … import` hides it then
            return None
        spec = importlib.machinery.ModuleSpec(fullname, StandInLoader(names, real), is_package=True)
        if real is not None:
            spec.submodule_search_locations = list(real.submodule_search_locations or ())
            spec.origin, spec.has_location = real.origin, real.origin is not None
        return spec

    def _real_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        root = fullname.partition(".")[0]
        if EXTENSIONS[root] == root:
            return None  # it was tried, and does not load
        for finder in sys.meta_path:
            if not isinstance(finder, StandInFinder) and (spec := finder.find_spec(fullname, path, target)):
                return spec
        return None


class StandInLoader(importlib.abc.Loader):
    """Runs a package's own file; where there is none, or it fails, the module has the names of the table."""

    def __init__(self, names: Mapping[str, Any], real: importlib.machinery.ModuleSpec | None) -> None:
        self.names, self.real = names, real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if self.real is not None and self.real.loader is not None and self.real.origin is not None:
            try:
                return self.real.loader.exec_module(module)
            except Exception as error:
                log.info("%s is stood in for, since its file fails: %s", module.__name__, error)
        module.__dict__.update(self.names)
        module.__dict__["__getattr__"] = _missing(module.__name__)


def _missing(module: str) -> Any:
    def missing(name: str) -> Any:
        raise AttributeError(_not_covered(f"{module}.{name}"))

    return missing


def _not_covered(fullname: str) -> str:
    parent, _, leaf = fullname.rpartition(".")
    while parent not in STAND_INS:
        parent, _, leaf = parent.rpartition(".")
    inside = [name.removeprefix(f"{parent}.") for name in STAND_INS if name.startswith(f"{parent}.")]
    covered = [*STAND_INS[parent], *(name for name in inside if "." not in name)]
    return f"ptq4vm's stand-in for {parent} has no {leaf}; it covers {', '.join(covered) or 'no names'}"
