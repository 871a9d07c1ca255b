"""The native library: schemas, and what runs without it."""

from helpers.draws import (
    available,
    needs_library,
)
from helpers.native_library import run

USE = (
    "import torch; from ptq4vm import ops; from ptq4vm.backend import native\n"
    "one = torch.ones(1); zero = torch.zeros(1, dtype=torch.int32)\n"
    "q = torch.ones(1, 2, 3, dtype=torch.int8)\n"
    "for _ in range(3): y = ops.linear(q, one, zero, q[0], torch.ones(2), None, torch.float32)\n"
    "assert y.tolist() == [[[3.0, 3.0], [3.0, 3.0]]]; print(native.isa())"
)


def test_the_reference_runs_where_it_is_asked_for_and_says_nothing():
    assert run(USE, PTQ4VM_ISA="reference").strip() == "reference"


def test_without_a_library_one_warning_names_the_way_out():
    code = (
        "from pathlib import Path; import ptq4vm.backend.native; ptq4vm.backend.native.LIBRARY = Path('none.so')\n"
        + USE
    )
    said = run(code)
    assert said.count("RuntimeWarning") == 1 and "Install a C++ compiler" in said and "reference" in said


@needs_library
def test_the_environment_names_the_best_instruction_set():
    for name in available():
        assert run(USE, PTQ4VM_ISA=name).strip() == name
