"""Printing: progress on standard error, and the result of a command on standard output."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq4vm.terminal_text import escaped


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a command, for programs and for people."""

    result: dict[str, Any]
    lines: Sequence[str]
    code: int = 0
    """The exit code."""


def prepare_streams() -> None:
    """Lets no print fail for a character, nor for the lack of a standard error."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a line on standard error, for people; what came from files cannot act on their terminal."""
    print(escaped(text), file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """Says why a command ends, even where nobody reads it."""
    with contextlib.suppress(OSError):
        say(f"ptq4vm: {text}")


@contextlib.contextmanager
def stage(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Says what begins, since it takes a while, and adds how long it took to `seconds`."""
    say(f"{name} …")
    start = time.perf_counter()
    yield
    if seconds is not None:
        seconds[name] = time.perf_counter() - start


def show(outcome: Outcome, as_json: bool) -> int:
    """Prints the result and returns the exit code."""
    from ptq4vm.formatting import to_json

    lines = "\n".join(outcome.lines).split("\n")
    text = to_json(outcome.result) if as_json else "\n".join(map(escaped, lines))
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        print(text, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError, AttributeError):  # Python must not try to flush again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            return outcome.code
        complain(f"error: the result cannot be written to standard output: {error}")
        return 1
    return outcome.code


def loss_table(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a table of the losses of learning; nothing where nothing was learned."""
    from ptq4vm.formatting import table

    rows = [block for block in blocks if "loss_after" in block]
    columns = {"block": "block", "loss_before": "loss before", "loss_after": "loss after"}
    return [table(rows, columns)] if rows else []
