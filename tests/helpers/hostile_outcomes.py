"""Runs many hostile cases in child processes, which may crash or hang, and counts how each ended."""

import contextlib
import io
import json
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptq4vm.cli import main as cli

CLEAR = ("used as it is", "clear error")
BAD = ("unclear error", "crash", "hang", "silent difference")
SECONDS = 30
"""Seconds after which a case counts as hanging, unless it is known to take long."""
MEMORY = 6 << 30
"""Bytes that a child may allocate in addition: a huge claim must not take the machine."""

Case = Callable[[], str]
"""Returns one of the outcomes, and details after a colon."""


def run_all(
    cases: Sequence[tuple[str, Case]], folder: Path, at_once: int = 40, seconds: float = SECONDS
) -> list[dict[str, str]]:
    """Returns the outcome of every case, in order; after a crash or a hang a new child goes on with the next case."""
    found: list[dict[str, str]] = []
    while len(found) < len(cases):
        log = folder / f"outcomes_{len(found)}.jsonl"
        end = _child(cases[len(found) : len(found) + at_once], log, seconds)
        found += [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if end is not None:
            found.append({"kind": cases[len(found)][0], "outcome": end, "says": ""})
    return found


def _child(cases: Sequence[tuple[str, Case]], log: Path, seconds: float) -> str | None:
    """Returns None if the child finished its cases, else `crash` or `hang`."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            _work(cases, log)
            os._exit(0)
        os._exit(1)
    return _watch(process, log, seconds)


def _work(cases: Sequence[tuple[str, Case]], log: Path) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with log.open("w") as file, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        for kind, case in cases:
            outcome, _, says = case().partition(": ")
            file.write(json.dumps({"kind": kind, "outcome": outcome, "says": says}) + "\n")
            file.flush()


def _watch(process: int, log: Path, seconds: float) -> str | None:
    size, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return None if status == 0 else "crash"
        now = log.stat().st_size if log.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > seconds:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "hang"
        time.sleep(0.02)


def of_command(argv: Sequence[Any], word: str = "") -> str:
    """Returns how a command ends: exit 1 and one line with the word, exit 2 and usage, or a result."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(word) for word in argv])
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        return f"unclear error: traceback of {type(error).__name__}: {error}"
    lines = [line for line in err.getvalue().splitlines() if not line.endswith(" …")]
    if any(not char.isprintable() and char != "\n" for char in out.getvalue() + err.getvalue()):
        return f"unclear error: control characters in {ascii(err.getvalue())[:200]}"
    if code == 0 and not lines:
        return "used as it is"
    if code == 1 and len(lines) == 1 and lines[0].startswith("ptq4vm: error: ") and word in lines[0]:
        return f"clear error: {lines[0]}"
    if code == 2 and "usage: ptq4vm" in err.getvalue():
        return f"clear error: {lines[-1]}"
    return f"unclear error: exit {code}, {err.getvalue()[:300]}"


def table(found: Sequence[dict[str, str]]) -> str:
    """Returns a table of kinds by outcomes."""
    counts = Counter((row["kind"], row["outcome"]) for row in found)
    names, kinds = (*CLEAR, *BAD), list(dict.fromkeys(row["kind"] for row in found))
    lines = [["", *names], *([kind, *(str(counts[kind, name]) for name in names)] for kind in [*kinds])]
    lines.append(["all", *(str(sum(row["outcome"] == name for row in found)) for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def report(name: str, found: Sequence[dict[str, str]]) -> None:
    """Prints the table, writes the counts to PTQ4VM_HOSTILE_JSON, and fails for bad outcomes."""
    print(f"\n{name}\n{table(found)}")
    if path := os.environ.get("PTQ4VM_HOSTILE_JSON"):
        file = Path(path)
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept[name] = {outcome: sum(row["outcome"] == outcome for row in found) for outcome in (*CLEAR, *BAD)}
        file.write_text(json.dumps(kept, indent=2) + "\n")
    bad = [row for row in found if row["outcome"] in BAD]
    assert not bad, "\n".join(f"{row['kind']}: {row['outcome']}: {row['says']}" for row in bad[:20])
