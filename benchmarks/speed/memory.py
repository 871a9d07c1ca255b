"""Memory that one forward takes: what a fresh process grows by.

    python -m benchmarks.speed.memory FOLDER KIND BATCH_SIZE THREADS

prints it, for a network that `measure` has written there.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4vm.benchmark.kinds import CHECKOUT, Network, build
from ptq4vm.saving import load, save

FLOAT, SHAPE, QUANTIZED = "float.pt", "shape.json", "quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The memory that a process which holds the model takes more while it computes one batch."""

    name: str
    batch_size: int
    threads: int
    bytes: int | None
    """None where the system cannot tell: it has no resettable peak."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    network: Network, shape: tuple[int, ...], kinds: Iterable[str], batch_size: int, threads: int
) -> list[Peak]:
    """Runs one process a kind. `shape` is that of an image."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(network.model, folder / FLOAT)
        save(network.quantized, folder / QUANTIZED)
        (folder / SHAPE).write_text(json.dumps(shape))
        peaks = []
        for kind in kinds:
            command = [sys.executable, "-m", __name__, str(folder), kind, str(batch_size), str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
            if done.returncode:
                reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise OSError(f"the process that measures the memory of {kind} failed: {reason[-1]}")
            count = json.loads(done.stdout.splitlines()[-1])
            peaks.append(Peak(name=kind, batch_size=batch_size, threads=threads, bytes=count))
    return peaks


def growth(folder: Path, kind: str, batch_size: int, threads: int) -> int | None:
    """Returns bytes; to be run in a process of its own."""
    torch.set_num_threads(threads)
    shape = json.loads((folder / SHAPE).read_text())
    images = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))
    call = build(kind, _network(folder), images)
    with torch.inference_mode():
        return _growth(call, images)


def _network(folder: Path) -> Network:
    model = torch.load(folder / FLOAT, weights_only=False)
    return Network(model, load(folder / QUANTIZED, model=model), folder)


def _growth(call: Any, images: Tensor) -> int | None:
    gc.collect()
    if sys.platform == "linux":
        # what earlier work has freed would be used again without the process growing
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
        before = _status("VmRSS")
        call(images)
        return _status("VmHWM") - before
    except (OSError, KeyError):
        return None


def _status(key: str) -> int:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int({words[0].rstrip(":"): words[1] for words in lines if len(words) > 1}[key])


if __name__ == "__main__":
    print(json.dumps(growth(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
