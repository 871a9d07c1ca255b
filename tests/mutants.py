"""`make mutants`: mutation testing with mutmut, on a sample drawn with a fixed seed.

    python tests/mutants.py [--sample N] [--seed S] [--only PATTERN] [--share 0.2] [--jobs N] [--again]

mutmut (its settings are in pyproject.toml) writes every one-line mutation of the package beside the original code into
`mutants/`, and runs the fast tests once to see which test reaches which function. This script draws the mutants and
chooses their tests: first those in the module's own files, then others that reach the function, the fastest first, up
to a share of the time of all. Each mutant is tested in a process of its own, until one test fails. Outcomes are kept in
`mutants/`: an interrupted run continues, and functions that have changed since are tested again.
"""

from __future__ import annotations

import argparse
import fnmatch
import random
import sys
from collections import Counter
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from mutmut import __main__ as mutmut
from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.utils.format_utils import mangled_name_from_mutant_name
from mutmut.workers.isolation import MutantResult, MutantRunner, get_mutant_runner

WANTED = 0.9
KILLED = ("killed", "timeout", "segfault")
Mutants = dict[str, SourceFileMutationData]


def main() -> int:
    """Returns 1 where the share of killed mutants is below WANTED."""
    arguments = parse_arguments()
    forget_editable_install()
    generate()
    mutants = draw(arguments.sample, arguments.seed, arguments.only)
    test(mutants, arguments.share, arguments.jobs, arguments.again)
    return report(mutants)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="mutation testing on a sample")
    parser.add_argument("--sample", type=int, metavar="N", help="how many mutants to draw (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="names, such as 'ptq4vm.passes.prepare.smooth.*'"
    )
    parser.add_argument("--share", type=float, default=0.2, help="of the time of all tests, for one mutant's")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--again", action="store_true", help="test survivors again, after tests were added")
    return parser.parse_args()


def forget_editable_install() -> None:
    """An editable install is found before any path, but the tests must import the mutated copy."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildInplaceFinder"]


def generate() -> None:
    """Write the mutated copy, and find which test reaches which function."""
    mutmut.set_mutant_under_test("mutant_generation")
    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    mutmut.create_mutants(1)
    mutmut.collect_or_load_stats(get_mutant_runner(), apply_config_invalidation=True)
    mutmut.set_mutant_under_test("")


def draw(size: int | None, seed: int, only: str) -> Mutants:
    """The mutants to test, in the order of the draw: a smaller sample is the beginning of a larger one."""
    files = [SourceFileMutationData(path=path) for path in sorted(walk_mutatable_files())]
    for file in files:
        file.load()
    mutants = {name: file for file in files for name in file.exit_code_by_key if fnmatch.fnmatch(name, only)}
    names = sorted(mutants)
    random.Random(seed).shuffle(names)
    return {name: mutants[name] for name in names[:size]}


def test(mutants: Mutants, share: float, jobs: int, again: bool) -> None:
    statuses = ("not checked", "survived") if again else ("not checked",)
    waiting = [name for name in mutants if status(mutants, name) in statuses]
    runner = get_mutant_runner(jobs)
    runner.startup()
    try:
        for done, name in enumerate(outcomes(runner, mutants, waiting, share), 1):
            print(f"{done}/{len(waiting)} {status(mutants, name)} {name}", flush=True)
    finally:
        runner.stop_all_workers()
        runner.shutdown()


def outcomes(runner: MutantRunner, mutants: Mutants, waiting: list[str], share: float) -> Iterator[str]:
    """Names of mutants, each when its outcome is in its file."""
    for name in waiting:
        while not runner.has_capacity():
            yield record(runner.wait_for_result(), mutants)
        submit(runner, name, tests_of(name, Path(mutants[name].path), share))
    while runner.pending_count():
        yield record(runner.wait_for_result(), mutants)


def submit(runner: MutantRunner, name: str, tests: list[str]) -> None:
    seconds = sum(state().duration_by_test[test] for test in tests)
    limit = ceil((seconds + config().timeout_constant) * config().timeout_multiplier)
    runner.submit(name, tests, limit, seconds)


def record(result: MutantResult, mutants: Mutants) -> str:
    file = mutants[result.mutant_name]
    file.exit_code_by_key[result.mutant_name] = result.exit_code
    file.save()
    return result.mutant_name


def tests_of(name: str, path: Path, share: float) -> list[str]:
    own = tuple(f"{Path('tests', *path.parts[1:-1])}/test_{path.stem}{end}" for end in (".py::", "_"))
    reaching = state().tests_by_mangled_function_name.get(mangled_name_from_mutant_name(name), set())
    durations, spent = state().duration_by_test, 0.0
    chosen = []
    for test in sorted(reaching, key=lambda test: (not test.startswith(own), durations[test], test)):
        spent += durations[test]
        if not test.startswith(own) and spent > share * sum(durations.values()):
            break
        chosen.append(test)
    return chosen


def status(mutants: Mutants, name: str) -> str:
    return str(status_by_exit_code[mutants[name].exit_code_by_key[name]])


def report(mutants: Mutants) -> int:
    found = {name: status(mutants, name) for name in mutants}
    survivors = sorted(name for name in found if found[name] not in KILLED)
    for name in survivors:
        print(f"\n{found[name]}: {name}\n{get_diff_for_mutant(name, path=mutants[name].path)}")
    print(f"\n{'module':<34}{'killed':>8}{'of':>6}")
    modules = Counter(str(file.path) for file in mutants.values())
    left = Counter(str(mutants[name].path) for name in survivors)
    for path in sorted(modules):
        print(f"{path:<34}{modules[path] - left[path]:>8}{modules[path]:>6}")
    rate = 1 - len(survivors) / max(len(found), 1)
    print(f"{'all':<34}{len(found) - len(survivors):>8}{len(found):>6}  {rate:.1%}  {dict(Counter(found.values()))}")
    return int(rate < WANTED)


if __name__ == "__main__":
    sys.exit(main())
