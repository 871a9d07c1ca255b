"""`make mutants`: mutation testing with mutmut, on a sample drawn with a fixed seed.

    python tests/mutants.py [--sample N] [--seed S] [--only PATTERN] [--again]

mutmut (its settings are in pyproject.toml) writes every one-line mutation of the package beside the original code into
`mutants/`, and runs the fast tests once to see which test reaches which function. This script draws the mutants and
chooses their tests: first those in the module's own file, then others that reach the function, the fastest
first, up to SECONDS in all. Each mutant is tested in a process of its own, until one test fails. Outcomes are kept in
`mutants/`: an interrupted run continues, and functions that have changed since are tested again.
"""

from __future__ import annotations

import argparse
import fnmatch
import random
import sys
import time
from collections import Counter
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
from mutmut.workers.isolation import MutantRunner, get_mutant_runner

SECONDS = 60.0
WANTED = 0.9
KILLED = ("killed", "timeout", "segfault")
Mutants = dict[str, SourceFileMutationData]


def main() -> int:
    """Returns 1 where the share of killed mutants is below WANTED."""
    arguments = parse_arguments()
    forget_editable_install()
    generate()
    mutants = draw(arguments.sample, arguments.seed, arguments.only)
    test(mutants, again=arguments.again)
    return report(mutants)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="mutation testing on a sample")
    parser.add_argument("--sample", type=int, metavar="N", help="how many mutants to draw (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names, such as 'ptq4vm.passes.smooth.*'")
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


def test(mutants: Mutants, again: bool) -> None:
    waiting = [name for name in mutants if status(mutants, name) in ("not checked", *(["survived"] if again else []))]
    runner = get_mutant_runner()
    runner.startup()
    try:
        for i, name in enumerate(waiting, 1):
            begin = time.perf_counter()
            run(runner, name, mutants[name])
            seconds = time.perf_counter() - begin
            print(f"{i}/{len(waiting)} {status(mutants, name)} {name} {seconds:.1f} s", flush=True)
    finally:
        runner.stop_all_workers()
        runner.shutdown()


def run(runner: MutantRunner, name: str, file: SourceFileMutationData) -> None:
    tests = tests_of(name, Path(file.path))
    seconds = sum(state().duration_by_test[test] for test in tests)
    limit = ceil((seconds + config().timeout_constant) * config().timeout_multiplier)
    runner.submit(name, tests, limit, seconds)
    file.exit_code_by_key[name] = runner.wait_for_result().exit_code
    file.save()


def tests_of(name: str, path: Path) -> list[str]:
    own = f"{Path('tests', *path.parts[1:-1])}/test_{path.name}::"
    reaching = state().tests_by_mangled_function_name.get(mangled_name_from_mutant_name(name), set())
    chosen, seconds = [], 0.0
    for test in sorted(reaching, key=lambda test: (not test.startswith(own), state().duration_by_test[test], test)):
        seconds += state().duration_by_test[test]
        if not test.startswith(own) and seconds > SECONDS:
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
