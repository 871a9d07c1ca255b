"""Replaces files so that they are old or new, never half written, whatever ends the process or the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path, and renames the file once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; some systems cannot open folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftovers(folder: Path) -> list[Path]:
    """Returns temporary files in a folder, and folders beside it, of processes that were killed while they wrote."""
    inside = folder.glob(".*.tmp") if folder.is_dir() else ()
    beside = folder.parent.glob(f".{folder.name}.*") if folder.parent.is_dir() else ()
    found = []
    for path in (*inside, *beside):
        match = re.fullmatch(r"\..+\.(\d+)\.(tmp|old)", path.name)
        if match and not _is_running(int(match[1])):
            found.append(path)
    return sorted(found)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
