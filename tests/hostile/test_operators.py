"""Every operator of `torch.ops.ptq4vm` under bad arguments: an error that says what is wrong, or the right result.

tests/hostile_operators.py draws the calls, in processes that may crash. The long run uses kernels built with
AddressSanitizer and UndefinedBehaviorSanitizer. PTQ4VM_HOSTILE_CALLS says how many calls, PTQ4VM_HOSTILE_SEED which,
and PTQ4VM_HOSTILE_JSON where the counts are written.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import hostile_operators

from ptq4vm.backend import native

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("PTQ4VM_HOSTILE_SEED", "0"))
CALLS = int(os.environ.get("PTQ4VM_HOSTILE_CALLS", "2000"))
SECONDS = 60
"""Without an end to a call: a hang. Drawing the valid calls takes some of them."""

KINDS = ("right", "clear error", "unclear error", "crash", "hang", "silent difference")


class Process:
    """The calls [first, last), in one process after another."""

    def __init__(self, library: str, folder: Path, environment: dict[str, str]) -> None:
        self.library, self.log, self.errors = library, folder / "log", folder / "errors"
        path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"} | environment

    def run(self, first: int, last: int) -> list[dict]:
        self.log.write_text("")
        found: list[dict] = []
        while first + len(found) < last:
            code = self._go_on(first + len(found), last)
            found = [self._read(line, code) for line in self.log.read_text().splitlines()]
            self.log.write_text("".join(json.dumps(line) + "\n" for line in found))
            assert code == 0 or (found and found[-1]["kind"] in ("crash", "hang")), self.errors.read_text()[-3000:]
        return found

    def _go_on(self, first: int, last: int) -> int | None:
        """The exit code; None of a process that was stopped since it did not go on."""
        script = str(Path(hostile_operators.__file__))
        command = [sys.executable, script, self.library, str(self.log), str(SEED), str(first), str(last)]
        with (
            open(self.errors, "w") as errors,
            subprocess.Popen(command, env=self.environment, stderr=errors, stdout=errors) as process,
        ):
            size, since = -1, time.monotonic()
            while process.poll() is None:
                time.sleep(0.05)
                if self.log.stat().st_size != size:
                    size, since = self.log.stat().st_size, time.monotonic()
                elif time.monotonic() - since > SECONDS:
                    process.kill()
                    return None
            return process.returncode

    def _read(self, line: str, code: int | None) -> dict:
        called, _, came = line.partition("\t")
        if came or "kind" in json.loads(called):
            return json.loads(called) | json.loads(came or "{}")
        kind = "hang" if code is None else "crash"
        return json.loads(called) | {"kind": kind, "said": f"exit {code}: {self.errors.read_text()[-1500:]}"}


def counts(found: list[dict]) -> dict[str, dict[str, int]]:
    """By operator, and in all."""
    table: dict[str, Counter] = {}
    for line in found:
        for row in (line["operator"], "all"):
            table.setdefault(row, Counter())[line["kind"]] += 1
    return {name: {kind: table[name][kind] for kind in KINDS} for name in sorted(table)}


def judge(found: list[dict], name: str) -> None:
    """Prints the table, writes the counts, and fails for whatever is neither right nor a clear error."""
    table = counts(found)
    width = max(map(len, table))
    print(f"\n{name}\n{'':{width}}", *(f"{kind:>17}" for kind in KINDS))
    for operator, row in table.items():
        print(f"{operator:{width}}", *(f"{row[kind]:17}" for kind in KINDS))
    if target := os.environ.get("PTQ4VM_HOSTILE_JSON"):
        kept = json.loads(Path(target).read_text()) if Path(target).exists() else {}
        Path(target).write_text(json.dumps(kept | {name: {"seed": SEED, "calls": len(found), **table}}, indent=1))
    bad = [line for line in found if line["kind"] not in ("right", "clear error")]
    assert not bad, json.dumps(bad[:8], indent=1)


def sanitized() -> tuple[str, dict[str, str]] | None:
    """The library with sanitizers, built anew where a source is, and what a process needs to load it."""
    if native.unavailable_reason() is not None or not shutil.which("cmake") or not shutil.which("gcc"):
        return None
    folder = ROOT / "build" / "sanitize"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "PTQ4VM_SANITIZE": "ON",
        "PTQ4VM_TORCH": Path(torch.__file__).parent,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
    }
    build = ["cmake", "-S", ROOT / "csrc", "-B", folder, *(f"-D{name}={value}" for name, value in options.items())]
    for command in (build, ["cmake", "--build", folder, "--parallel", "2"]):
        subprocess.run(command, check=True, capture_output=True)
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run(["gcc", f"-print-file-name={n}"], check=True, capture_output=True, text=True) for n in names
    ]
    libraries = [done.stdout.strip() for done in found]
    options_of_asan = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096"
    return str(folder / "_C_cpu.so"), {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": options_of_asan}


needs_library = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


@needs_library
def test_some_bad_calls_are_told(tmp_path):
    judge(Process(str(native.LIBRARY), tmp_path, {}).run(0, 240), "operators, a few")


def test_some_bad_calls_are_told_without_kernels(tmp_path):
    judge(Process("reference", tmp_path, {}).run(240, 360), "operators of the reference, a few")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_bad_calls_are_told(tmp_path, kernels):
    """The kernels as they are, whose memory for results is filled with other garbage at every call."""
    if kernels == "native" and native.unavailable_reason() is not None:
        pytest.skip(str(native.unavailable_reason()))
    library = str(native.LIBRARY) if kernels == "native" else "reference"
    judge(Process(library, tmp_path, {}).run(0, CALLS), f"operators, {kernels}")


@pytest.mark.slow
def test_bad_calls_are_told_under_sanitizers(tmp_path):
    built = sanitized()
    if built is None:
        pytest.skip("needs native kernels, cmake and gcc")
    judge(Process(built[0], tmp_path, built[1]).run(0, CALLS), "operators, sanitizers")
