"""A command that does not come to its end: ended by a signal, or by an error that a user or the machine caused."""

import argparse
import contextlib
import re
import signal
import threading
from collections.abc import Iterator

INTERRUPTED, TERMINATED = 130, 143
"""128 + SIGINT and 128 + SIGTERM, as shells report them."""

MEMORY = r"(?i)out of memory|can't allocate memory|cannot allocate memory|not enough memory|unable to allocate"
FULL = r"(?i)no space left|disk quota|file too large|PytorchStreamWriter failed|read-only file system"
READERS = ("SafetensorError", "UnpicklingError", "BadZipFile", "EOFError", "RecursionError")
"""Errors that readers and writers of files raise beside OSError; the packages are not imported to tell."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came, and ends the command as SIGINT does."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM raise `Terminated`; only the main thread may say so."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def interrupted_text(args: argparse.Namespace) -> str:
    """Returns the line that a signal leaves behind."""
    if "resume_dir" not in args:
        return "interrupted"
    if args.resume_dir is None:
        return "interrupted; nothing is kept (with --resume-dir finished blocks would be)"
    return f"interrupted; finished blocks are kept in {args.resume_dir}: the same command continues there"


def message_of(error: Exception, args: argparse.Namespace) -> str | None:
    """Returns all there is to say of what a user or the machine caused; None for our mistakes, to keep a traceback."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or re.search(MEMORY, text):
        return f"out of memory ({text}); take fewer images at once, or a machine with more"
    if not _is_expected(error, text):
        return None
    files = (getattr(args, name, None) for name in ("output", "resume_dir", "csv", "picture"))
    where = [str(file) for file in files if file is not None]
    unnamed = re.search(FULL, text) and not any(file in text for file in where)
    return f"{text}; it was writing {' or '.join(where)}" if unnamed and where else text


def _is_expected(error: Exception, text: str) -> bool:
    if isinstance(error, ValueError | OSError | ImportError) or type(error).__name__ in READERS:
        return True
    if not isinstance(error, RuntimeError):
        return False
    from ptq4vm.graph.capture import CaptureError

    return isinstance(error, CaptureError) or bool(re.search(rf"{FULL}|C\+\+ compiler", text))
