"""tests/gpu without a GPU: the same tests on the CPU, so that a mistake in them is found here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ptq4vm

HERE = Path(__file__).parent


def run(*options: str, **settings: str) -> str:
    path = [str(Path(ptq4vm.__file__).parents[1]), *sys.path]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, path)), **settings}
    # -S: this process's path and no other
    command = [sys.executable, "-S", "-m", "pytest", HERE, "-m", "gpu", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_tests_of_a_gpu_pass_on_the_cpu():
    said = run("-v", "-p", "no:xdist", PTQ4VM_TEST_DEVICE="cpu", PTQ4VM_TEST_EXAMPLES="6", PTQ4VM_TEST_SEED="7")
    assert int(re.search(r"(\d+) passed", said)[1]) > 100 and "PTQ4VM_TEST_SEED=7" in said


@pytest.mark.slow
def test_tests_of_a_gpu_are_skipped_without_one():
    said = run("-rs", CUDA_VISIBLE_DEVICES="")
    assert "there is no GPU" in said and "passed" not in said
