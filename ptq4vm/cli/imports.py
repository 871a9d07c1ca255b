"""The user's own models: Python that is run because the command line names it, with stand-ins for what it lacks."""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def imported(names: Sequence[str]) -> Iterator[None]:
    """Imports files and modules, which register their models with timm; raises ImportError that names the one.

    `mamba_ssm` and its kin resolve to this package's operators where they are not installed, until the context ends.
    """
    if not names:
        yield
        return
    from ptq4vm.authors import stand_ins

    with stand_ins():
        for name in names:
            _import(name)
        yield


def _import(name: str) -> None:
    """Imports a file as a script's folder sees it, or a module as the working folder does."""
    path = Path(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise FileNotFoundError(f"--import {name}: there is no such file")
    folder = str(path.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        importlib.import_module(path.stem if is_file else name)
    except Exception as error:
        raise ImportError(f"--import {name}: {type(error).__name__}: {error}") from error
