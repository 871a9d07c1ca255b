"""Runs models of the authors' own repositories through the whole road, unmodified: one row a model.

    python benchmarks/authors.py --clones DIR                       # all that DIR has a clone of
    python benchmarks/authors.py --clones DIR --only vim vmamba --compile
    python benchmarks/authors.py --list                             # the repositories, to clone

Weights are random and models small (`authors_repositories.py`); CUDA extensions are stood in for (`ptq4vm.authors`). A
row says how many products of weights are quantized, and of their multiply-adds; how many linears hold the same
integers lowered as with Q/DQ; how many places are fused and left; and how far a model got, with the reason in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the script runs without an editable install too

from benchmarks.authors_repositories import REPOSITORIES
from ptq4vm.formatting import table, write_json

WORKER = Path(__file__).with_name("authors_worker.py")
LAST = {False: "run fused", True: "compile"}
"""The stage that ends the road, without and with `--compile`."""


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one repository in a process; what ends the process is its row's error."""
    if not (options.clones / REPOSITORIES[name].clone).is_dir():
        return {"name": name, "error": f"no clone: git clone {REPOSITORIES[name].url}", "reached": None}
    command = [sys.executable, str(WORKER), "--clones", str(options.clones.resolve()), "--name", name]
    command += ["--config", options.config, *(["--compile"] if options.compile else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, env=environment)
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"not done in {options.timeout} s", "reached": None}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines() or ["no message"]
        return {"name": name, "error": f"exit code {done.returncode}: {errors[-1]}", "reached": None}
    return json.loads(lines[-1])


def summary(row: dict[str, Any], last: str) -> dict[str, Any]:
    """The columns of the table."""
    share = row.get("multiply_adds_quantized")
    return {
        "model": row["name"],
        "quantized": f"{row['quantized']}/{row['products']}" if share is not None else None,
        "MACs %": None if share is None else 100 * share,
        "lowered = Q/DQ": row.get("equal_linears"),
        "fused": row.get("fused"),
        "left": row.get("unfused"),
        "prepare s": row.get("seconds", {}).get("prepare"),
        "calibrate s": row.get("seconds", {}).get("calibrate"),
        "reached": "all" if row["reached"] == last and row["error"] is None else row["reached"],
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=Path, default=Path("clones"), help="folder of the repositories' clones")
    parser.add_argument("--only", nargs="+", default=list(REPOSITORIES), choices=REPOSITORIES, metavar="MODEL")
    parser.add_argument("--config", default="minmax8", help="a recipe with its bits; minmax8 calibrates fastest")
    parser.add_argument("--compile", action="store_true", help="torch.compile each with the backend ptq4vm, too")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="of each model")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the rows, with every place that was left, as JSON")
    parser.add_argument("--list", action="store_true", help="print the repositories' addresses and do nothing else")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.list:
        return print("\n".join(sorted({repository.url for repository in REPOSITORIES.values()})))
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = []
        for row in pool.map(lambda name: run(name, options), options.only):
            print(f"{row['name']}: {row['error'] or 'done'}", file=sys.stderr, flush=True)
            rows.append(row)
    print(table([summary(row, LAST[options.compile]) for row in rows]))
    if options.output is not None:
        write_json(options.output, rows)


if __name__ == "__main__":
    main()
