"""Times an epoch of JLSS of one Vim-S block, with the native kernels and with the operators in plain PyTorch.

    python benchmarks/learning.py [--images 32] [--epochs 5] [--rounds 3] [--threads 2]

JLSS learns smoothing factors and scales. The block has 197 tokens of 384 channels, W4A4, random images; an epoch is one
step, forward and backward. Both take turns in processes of their own, which time calibration with learning less
calibration without; medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import timm
import torch
from torch import Tensor, nn

import ptq4vm
import ptq4vm.models

WAYS = {"native": {}, "reference": {"PTQ4VM_ISA": "reference"}}
"""Environments of the two."""


def calibration_seconds(model: nn.Module, images: Tensor, config: ptq4vm.QuantConfig) -> float:
    prepared = ptq4vm.prepare(model, (images[:2],), config)
    clock = (
        time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    )  # the first counts no other program
    started = clock()
    ptq4vm.calibrate(prepared, [images], progress=False)
    return clock() - started


def epoch_seconds(images: int, epochs: int, threads: int) -> float:
    """Times one epoch with the kernels of this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, batch = timm.create_model("vim_small_patch16_224", depth=1).eval(), torch.randn(images, 3, 224, 224)
    learned = ptq4vm.QuantConfig.w4a4(learning=ptq4vm.Learning(epochs=epochs, batch_size=images))
    calibration_seconds(
        model, batch, replace(learned, learning=ptq4vm.Learning(epochs=1, batch_size=images))
    )  # warms up
    searched = calibration_seconds(model, batch, replace(learned, learning=None))
    return (calibration_seconds(model, batch, learned) - searched) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--once", action="store_true", help="print the seconds of this process, and start no other")
    options = parser.parse_args()
    if options.once:
        print(epoch_seconds(options.images, options.epochs, options.threads))
        return
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, environment in WAYS.items():
            command = [sys.executable, *sys.argv, "--once"]
            done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
            seconds[name].append(float(done.stdout))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{options.threads} threads, torch {torch.__version__}, {options.images} images")
    print(", ".join(f"{name} {median:.3f} s an epoch" for name, median in medians.items()))
    print(f"ratio {medians['reference'] / medians['native']:.1f}")


if __name__ == "__main__":
    main()
