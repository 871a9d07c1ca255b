"""Reads the files in which weights are published, without trusting them.

Training scripts pickle more than weights: arguments, a config, meters. These must not stop the reading, and must not
run: `torch.load(weights_only=True)` builds tensors, and here a namespace, a dict, and stand-ins that hold nothing.
"""

import argparse
import logging
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ptq4vm.terminal_text import escaped, listing

logger = logging.getLogger(__name__)


class _Inert:
    """Stand-in for a class or function in a pickle: accepts its arguments and state, and drops both."""

    def __new__(cls, *args: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_INERT = (
    # a NumPy scalar or array: the best accuracy, the log of a loss
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    # mmengine's message hub, whose history buffers name their own methods through getattr
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    # an output folder among the arguments
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.WindowsPath",
)
_ALLOWED: tuple[Any, ...] = (
    argparse.Namespace,
    # torch sets the items of a plain or an ordered dict only, so a config is read as one
    (OrderedDict, "yacs.config.CfgNode"),
    *((_Inert, name) for name in _INERT),
)


def read_weight_file(path: Path) -> object:
    """Returns the content of a file of torch.save, of either format, or of safetensors, on the CPU.

    Raises ValueError, which names the file, for any other file and for a pickle that would call anything.
    """
    return _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)


def _is_safetensors(path: Path) -> bool:
    """Whether a file is of safetensors, by its name or its content: the length of a JSON object, and the object."""
    if path.suffix.lower() == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and head[:2] != b"PK" and head[:1] != b"\x80"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # beside its own errors, KeyError for a dtype that torch lacks
        raise ValueError(f"{path}: truncated, or not a safetensors file ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Returns the first sentence of an error; torch.load goes on to recommend that the file be trusted."""
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"WeightsUnpickler error: *(.+)", str(error))
        return escaped(found[1])[:200] if found else "no pickle of weights"
    lines = str(error).splitlines() or [type(error).__name__]
    return escaped(lines[0].split(". ")[0])[:200]


def _check_archive(path: Path) -> None:
    """Refuses an archive that claims more bytes than it has: torch would ask for that much memory."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # torch's own reader will decide
        logger.debug("%s: %s", path, error)
        return
    if claimed > path.stat().st_size:
        raise ValueError(
            f"{path}: truncated, or not a checkpoint of torch.save (its entries claim {claimed} bytes, which the file "
            "does not have; torch.save does not compress)"
        )


def _read_pickle(path: Path) -> object:
    _check_archive(path)
    # the context removes its names at its end, so leave out those that the process allows already
    ours = [entry for entry in _ALLOWED if entry not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(ours), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own classes, and sparse tensors, which are refused
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        # a damaged file makes the reader fail halfway, with any kind of error
        except Exception as error:
            if refused := _refused(path, error):
                raise ValueError(
                    f"{path}: reading it would have to call {listing(refused)}, which could run any code; "
                    "in an environment you trust, re-save the weights alone, with "
                    "torch.save(ckpt['model'], ...) or as safetensors"
                ) from error
            raise ValueError(f"{path}: truncated, or not a checkpoint of torch.save ({_reason(error)})") from error


def _refused(path: Path, error: Exception) -> list[str]:
    """Returns the names of the classes and functions in the file that are not allowed."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip archive, as files older than torch 1.6: the message names the first one
        return re.findall(r"\bGLOBAL (\S+) w", str(error))
