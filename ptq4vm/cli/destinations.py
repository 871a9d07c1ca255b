"""Checks before the work whether what a command makes can be written."""

import os
import tempfile
from pathlib import Path


def check_folder(folder: str | Path) -> None:
    """Raises OSError that names the folder where it, or a new one beside it, cannot be made and filled."""
    path = Path(folder).absolute()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another folder")
    _check(folder, path, (path, path.parent))


def check_file(file: str | Path) -> None:
    """Raises OSError that names the file where it cannot be written under a temporary name and renamed."""
    path = Path(file).absolute()
    if path.is_dir():
        raise IsADirectoryError(f"{file} is a folder; give the name of a file")
    if os.path.lexists(path) and not path.is_file():
        raise FileExistsError(f"{file} is no regular file; choose another name")
    _check(file, path, (path.parent,))


def check_apart(output: str | Path, resume_dir: str | Path) -> None:
    """Raises ValueError where saving the model would touch the blocks of its calibration."""
    saved, blocks = Path(output).resolve(), Path(resume_dir).resolve()
    if saved.is_relative_to(blocks) or blocks.is_relative_to(saved):
        raise ValueError(f"--output {output} and --resume-dir {resume_dir} are one in the other; choose two folders")


def _check(wanted: str | Path, path: Path, places: tuple[Path, ...]) -> None:
    """Makes a file where there is a folder already, since rights alone do not tell of a disk that is full."""
    path.with_name(f".{path.name}.{os.getpid()}.tmp").exists()  # raises for a name that is too long as a temporary one
    for place in places:
        place = next(each for each in (place, *place.parents) if os.path.lexists(each))
        if not place.is_dir():
            raise NotADirectoryError(f"{wanted} cannot be made: {place} is no folder")
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"\0")
        except OSError as error:
            raise OSError(f"{wanted} cannot be written: {error.strerror} ({place})") from error
