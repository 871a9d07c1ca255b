"""Compares models of the authors' repositories, in full size, with ours of the same weights: W8A8, fused, in turns.

    python benchmarks/authors_against_ours.py --clones DIR
    python benchmarks/authors_against_ours.py --clones DIR --only vim --rounds 50

Weights are random. A row has the times of `prepare` and of the fused graphs, one image, and their ratios (theirs over
ours, of the medians), and how many places are left unfused in theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import ptq4vm
from benchmarks.authors_repositories import REPOSITORIES
from benchmarks.authors_stubs import Finder, noise
from benchmarks.authors_worker import build
from ptq4vm.authors import stand_ins
from ptq4vm.formatting import table
from ptq4vm.models.replace import replacement
from ptq4vm.passes.lower.fuse import fusions

SIZES: dict[str, dict[str, Any]] = {
    "vim": {"img_size": 224, "embed_dim": 192, "depth": 24, "num_classes": 1000},
    "vmamba": {"imgsize": 224, "dims": 96, "depths": [2, 2, 8, 2], "ssm_ratio": 1.0, "num_classes": 1000},
}
"""Arguments that make Vim-Ti and VMamba-T of the small models of `authors_repositories`."""


def turns(rounds: int, *functions: Callable[[], Any]) -> tuple[list[float], list[Any]]:
    """Returns the median times of functions that take turns, and what they returned last."""
    times: list[list[float]] = [[] for _ in functions]
    results: list[Any] = [None for _ in functions]
    for _ in range(rounds):
        for k, work in enumerate(functions):
            started = time.perf_counter()
            results[k] = work()
            times[k].append(time.perf_counter() - started)
    return [statistics.median(each) for each in times], results


def compared(name: str, clones: Path, rounds: int) -> dict[str, Any]:
    """Returns the row of one model."""
    known = REPOSITORIES[name]
    repository = dataclasses.replace(known, arguments=known.arguments | SIZES[name])
    torch.manual_seed(0)
    with stand_ins():
        theirs = build(repository, clones, Finder(repository.bare, repository.stubs))
        images, config = noise(2, (3, 224, 224), 1), ptq4vm.QuantConfig.minmax(8)
        ours = replacement(theirs, (images,))
        preparing = [partial(ptq4vm.prepare, model, (images,), config) for model in (theirs, ours)]
        turns(1, *preparing)  # what is imported and cached at first
        (prepare_theirs, prepare_ours), prepared = turns(3, *preparing)
        fused = [ptq4vm.fuse(ptq4vm.convert(ptq4vm.calibrate(each, [images], progress=False))) for each in prepared]
        with torch.no_grad():
            (time_theirs, time_ours), _ = turns(rounds, *(partial(gm, images[:1]) for gm in fused))
    left = [place for place in fusions(fused[0]) if place.skip_reason is not None]
    return {
        "model": name,
        "left": len(left),
        "prepare s": prepare_theirs,
        "× ours": prepare_theirs / prepare_ours,
        "ms": 1000 * time_theirs,
        "×  ours": time_theirs / time_ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=Path, default=Path("clones"), help="folder of the repositories' clones")
    parser.add_argument("--only", nargs="+", default=list(SIZES), choices=SIZES, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=20, help="images that each fused model sees")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(table([compared(name, options.clones.resolve(), options.rounds) for name in options.only]))


if __name__ == "__main__":
    main()
