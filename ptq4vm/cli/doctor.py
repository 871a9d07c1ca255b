"""Report what is installed, which kernels run, and whether they compute what they should."""

import argparse

from ptq4vm.cli.render import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds none."""


def run(args: argparse.Namespace) -> Outcome:
    from ptq4vm.doctor import diagnose, wrong_bits

    wrong = wrong_bits()
    verdict = f"quantize and linear are wrong at {wrong} bits" if wrong else "ok"
    found = diagnose() | {"self_check": verdict}
    machine, native = found["machine"], found["native"]
    problem, cuda_problem = native["problem"], native["cuda_problem"]
    lines = [
        *(f"{package} {number or 'is missing'}" for package, number in found["versions"].items()),
        *(f"{key}: {machine[key]}" for key in ("platform", "cpu_capability", "threads")),
        f"CUDA: {'available' if found['cuda'] else 'not available'}",
        f"native kernels: {'none, ' + problem if problem else native['isa']}",
        "native kernels for GPUs: "
        + (f"none, {cuda_problem}" if cuda_problem else f"for {', '.join(native['cuda_architectures'])}"),
        *(
            f"GPU {i}: {gpu['name']}, compute capability {gpu['capability']}"
            + ("" if gpu["native"] else ", not served by native kernels")
            for i, gpu in enumerate(found["gpus"])
        ),
        *(f"{name}: {implementation}" for name, implementation in found["operators"].items()),
        f"self-check against int64: {verdict}",
    ]
    return Outcome(found, lines, code=1 if wrong else 0)
