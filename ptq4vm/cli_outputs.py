"""Whether what a command makes can be written, known before the work and not after it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_folder(folder: str | Path) -> None:
    """Raises OSError that names the folder where it, or a new one beside it, cannot be made and filled."""
    path = Path(folder).absolute()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another folder")
    path.with_name(f".{path.name}.{os.getpid()}.tmp").exists()  # raises for a name that would be too long
    for place in (path, path.parent):
        _check_room(folder, next(each for each in (place, *place.parents) if os.path.lexists(each)))


def check_file(file: str | Path) -> None:
    """Raises OSError that names the file where it cannot be written under a temporary name and renamed."""
    path = Path(file)
    if path.is_dir():
        raise IsADirectoryError(f"{file} is a folder; give the name of a file")
    if os.path.lexists(path) and not path.is_file():
        raise FileExistsError(f"{file} is no regular file; choose another name")
    path.with_name(f".{path.name}.{os.getpid()}.tmp").exists()
    check_folder(path.parent)


def check_apart(output: str | Path, resume_dir: str | Path) -> None:
    """Raises ValueError where saving the model would touch the blocks of its calibration."""
    saved, blocks = Path(output).resolve(), Path(resume_dir).resolve()
    if saved == blocks or saved in blocks.parents or blocks in saved.parents:
        raise ValueError(f"--output {output} and --resume-dir {resume_dir} are one in the other; choose two folders")


def _check_room(wanted: str | Path, place: Path) -> None:
    """A file is made, since rights alone do not tell: the disk may be full or read-only."""
    if not place.is_dir():
        raise NotADirectoryError(f"{wanted} cannot be made: {place} is no folder")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(f"{wanted} cannot be written: {error.strerror} ({place})") from error
