"""Packages written into a folder on `sys.path`, as an author's clone or an installed wheel would be."""

import contextlib
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def packages(folder: Path, files: Mapping[str, str]) -> Iterator[None]:
    """Writes files, puts the folder first on `sys.path`, and forgets afterwards what was imported from it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(str(folder)):
                del sys.modules[name]
