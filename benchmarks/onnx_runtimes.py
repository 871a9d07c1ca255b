"""Times ONNX files in ONNX Runtime and OpenVINO beside the fused graph and the float network, in turns, on one thread.

    python benchmarks/onnx_runtimes.py [--models NAME …] [--batch-sizes 1 8] [--repeats 15] [--output FILE]

A row of the results is one model and batch size: CPU milliseconds of each way to run it, the ratios to `fused` in the
same round, the size of each file over that of `model.safetensors`, and the CPU seconds that writing it took. Rows are
added as they come, and those of this commit are not measured twice.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import append, origin, read
from benchmarks.speed.rivals import exported, onnxruntime_call
from ptq4vm.benchmark.kinds import Call, Network, build, builder
from ptq4vm.benchmark.timing import compare, machine
from ptq4vm.cli.sources import open_both
from ptq4vm.formatting import table
from ptq4vm.metadata import metadata_of
from ptq4vm.saving import WEIGHTS, save

MODELS = ("vim_tiny_patch16_224", "vim_small_patch16_224", "vmamba_tiny_s1l8")
FILES = ("portable", "onnxruntime", "custom")
PORTABLE = "onnxruntime-portable"
"""The portable file in ONNX Runtime, beside the form that is meant for it."""
WAYS = ("fused", "onnxruntime-custom", "onnxruntime-int8", "onnxruntime-fp32", "openvino-int8", "openvino-fp32")
RESULTS = Path(__file__).parent / "results" / "onnx_runtimes.jsonl"


def write(network: Network) -> dict[str, dict[str, float]]:
    """Writes a model's files; returns their sizes over that of the saved weights, and the CPU seconds of each."""
    save(network.quantized, network.folder / "saved")
    saved = (network.folder / "saved" / WEIGHTS).stat().st_size
    sizes, seconds = {}, {}
    for runtime in FILES:
        before = time.process_time()
        path = exported(network, runtime)
        seconds[runtime] = round(time.process_time() - before, 1)
        sizes[runtime] = round(path.stat().st_size / saved, 3)
    return {"file_over_saved": sizes, "export_s": seconds}


def measured(network: Network, images: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    calls: dict[str, Call] = {way: build(way, network, images) for way in WAYS}
    calls[PORTABLE] = onnxruntime_call(exported(network, "portable"))
    timings = compare(calls, images, repeats=repeats)
    return {
        "cpu_ms": {timing.name: round(1e3 * timing.cpu, 2) for timing in timings},
        "over_fused": {timing.name: round(timing.ratio, 3) for timing in timings},
        "spread": {timing.name: round(timing.ratio_spread, 3) for timing in timings},
    }


def run(models: Sequence[str], batch_sizes: Sequence[int], repeats: int, output: Path) -> None:
    for way in WAYS:
        builder(way)  # what is missing is said before hours of work
    facts = {**machine(), **origin(), **{name: version(name) for name in ("onnx", "onnxruntime", "openvino")}}
    done = {(row["model"], row["batch_size"]) for row in read(output) if row["commit"] == facts["commit"]}
    for model in models:
        missing = [count for count in batch_sizes if (model, count) not in done]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            network = Network(*open_both(model), Path(folder))
            files = write(network)
            print(f"{model}: {files}", flush=True)
            for count in missing:
                images = torch.randn(count, *metadata_of(network.quantized).input_shapes[0])
                row = {"model": model, "batch_size": count, **measured(network, images, repeats), **files}
                append(output, row | {"repeats": repeats, "date": datetime.now(UTC).date().isoformat()} | facts)
                print(f"{model}, batch {count}\n{table(_lines(row))}", flush=True)


def _lines(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"": way, "CPU ms": ms, "/ fused": row["over_fused"][way]} for way, ms in row["cpu_ms"].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names, or saved folders")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(1, 8), metavar="N")
    parser.add_argument("--repeats", type=int, default=15, metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    torch.set_num_threads(1)
    run(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
