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
    _check_name(path)
    _check_room(folder, path)
    _check_room(folder, path.parent)


def check_file(file: str | Path) -> None:
    """Raises OSError that names the file where it cannot be written under a temporary name and renamed."""
    path = Path(file).absolute()
    if path.is_dir():
        raise IsADirectoryError(f"{file} is a folder; give the name of a file")
    if os.path.lexists(path) and not path.is_file():
        raise FileExistsError(f"{file} is no regular file; choose another name")
    _check_name(path)
    _check_room(file, path.parent)


def check_apart(output: str | Path, resume_dir: str | Path) -> None:
    """Raises ValueError where saving the model would touch the blocks of its calibration."""
    saved, blocks = Path(output).resolve(), Path(resume_dir).resolve()
    if saved == blocks or saved in blocks.parents or blocks in saved.parents:
        raise ValueError(f"--output {output} and --resume-dir {resume_dir} are one in the other; choose two folders")


def _check_name(path: Path) -> None:
    """The system raises for a name that is too long, here with what temporary names have beside it."""
    path.with_name(f".{path.name}.{os.getpid()}.tmp").exists()


def _check_room(wanted: str | Path, place: Path) -> None:
    """A file is made where there is a folder already, since rights alone do not tell of a disk that is full."""
    place = next(each for each in (place, *place.parents) if os.path.lexists(each))
    if not place.is_dir():
        raise NotADirectoryError(f"{wanted} cannot be made: {place} is no folder")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(f"{wanted} cannot be written: {error.strerror} ({place})") from error
