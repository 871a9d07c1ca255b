"""Saved folders that are damaged, or made to harm who loads them, and calibrations that are killed.

python -m pytest -m slow -s tests/hostile/test_folders.py
"""

import functools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.forgery import forged
from helpers.hostile_mutations import BYTES, MEANING
from helpers.hostile_outcomes import Case, report, run_all
from helpers.portable_models import made

from ptq4vm import QuantConfig, calibrate, convert, load, prepare, save
from ptq4vm.saving import CheckpointError

SEEDS = int(os.environ.get("PTQ4VM_HOSTILE_SEEDS", "250"))
"""Number of mutations of each kind."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FILES = ("model.safetensors", "config.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, tuple[torch.Tensor, ...], torch.Tensor]:
    """Returns a small model's folder, inputs and outputs."""
    model, inputs = made("raw")
    prepared = calibrate(prepare(model, inputs, QuantConfig.recipe("pts", 4)), [inputs], progress=False)
    quantized = convert(prepared)
    return save(quantized, tmp_path_factory.mktemp("saved") / "model"), inputs, quantized(*inputs)


def outcome(folder: Path, inputs: tuple, wanted: torch.Tensor, *, by_forger: bool) -> str:
    """Loads a folder: it is refused by name, or is the function that was saved.

    A forger's function may be another one, and may raise for inputs, but with a clear error.
    """
    try:
        loaded = load(folder)
    except CheckpointError as error:
        printable = str(error).isprintable() and len(str(error)) < 2000
        return "clear error" if str(folder) in str(error) and printable else f"unclear error: {error!r:.300}"
    except BaseException as error:
        return f"unclear error: {type(error).__name__}: {error}"
    try:
        with torch.no_grad():
            same = torch.equal(loaded(*inputs), wanted)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        return "clear error" if by_forger else f"unclear error: {error}"
    return "used as it is" if same or by_forger else "silent difference"


def case(saved: tuple, folder: Path, change: Callable[[Path], None], *, by_forger: bool = False) -> Case:
    def run() -> str:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[0], folder)
        change(folder)
        return outcome(folder, *saved[1:], by_forger=by_forger)

    return run


def change_bytes(mutate: Callable[[random.Random, bytearray], None], seed: int, name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    mutate(random.Random(seed), data)
    (folder / name).write_bytes(data)


def change_header(mutate: Callable[[random.Random, bytearray], None], seed: int, folder: Path) -> None:
    """Mutates the header alone, and keeps its length right."""
    data = (folder / FILES[0]).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = bytearray(data[8:end])
    mutate(random.Random(seed), header)
    (folder / FILES[0]).write_bytes(struct.pack("<Q", len(header)) + bytes(header) + data[end:])


def change_meaning(mutate: Callable[..., None], seed: int, folder: Path) -> None:
    (folder / "config.json").unlink()
    path = folder / FILES[0]
    path.write_bytes(forged(path.read_bytes(), functools.partial(mutate, random.Random(seed))))


def test_damaged_folders_are_refused_or_are_what_was_saved(saved, tmp_path):
    cases = []
    for mutate in BYTES:
        for seed in range(SEEDS):
            change = functools.partial(change_bytes, mutate, seed, FILES[seed % 2])
            cases.append((f"bytes: {mutate.__name__}", case(saved, tmp_path / "model", change)))
            change = functools.partial(change_header, mutate, seed)
            cases.append((f"header: {mutate.__name__}", case(saved, tmp_path / "model", change)))
    report("saved folders, damaged", run_all(cases, tmp_path, at_once=500))


def test_forged_folders_are_refused_or_only_compute(saved, tmp_path):
    cases = []
    for mutate in MEANING:
        for seed in range(SEEDS):
            change = functools.partial(change_meaning, mutate, seed)
            cases.append((mutate.__name__, case(saved, tmp_path / "model", change, by_forger=True)))
    report("saved folders, forged with a right digest", run_all(cases, tmp_path, at_once=100))


WRITER = """
import sys, torch, ptq4vm
torch.set_num_threads(1)
models = [ptq4vm.load(folder) for folder in sys.argv[2:4]]
print("ready", flush=True)
while True:
    for model in models:
        ptq4vm.save(model, sys.argv[1])
"""


def test_a_save_that_is_killed_leaves_a_whole_model(saved, tmp_path):
    folder, inputs, wanted = saved
    model, _ = made("raw")
    other = convert(calibrate(prepare(model, inputs, QuantConfig.recipe("minmax", 8)), [inputs], progress=False))
    folders = [folder, save(other, tmp_path / "other")]
    outputs = [wanted, other(*inputs)]
    target = save(other, tmp_path / "target")

    def killed(seed: int) -> str:
        command = [sys.executable, "-c", WRITER, str(target), *map(str, folders)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(random.Random(seed).uniform(0, 0.3))
            writer.send_signal(signal.SIGKILL)
        try:
            y = load(target)(*inputs)
        except BaseException as error:
            return f"unclear error: {error!r}"
        return "used as it is" if any(torch.equal(y, logits) for logits in outputs) else "silent difference"

    cases: list[tuple[str, Case]] = [("killed save", functools.partial(killed, seed)) for seed in range(20)]
    report("saves that are killed", run_all(cases, tmp_path, seconds=600))


CALIBRATION = """
import sys, torch, ptq4vm
sys.path[:0] = [sys.argv[1]]
torch.set_num_threads(1)
from helpers.portable_models import made
model, inputs = made("vim_nano_patch4_32")
config = ptq4vm.QuantConfig.w4a4(learning=ptq4vm.Learning(epochs=3))
prepared = ptq4vm.prepare(model, inputs, config)
print("ready", flush=True)
ptq4vm.calibrate(prepared, [inputs], resume_dir=sys.argv[2], progress=False)
ptq4vm.save(ptq4vm.convert(prepared), sys.argv[3])
"""


def test_a_calibration_that_is_killed_goes_on_to_the_same_bytes(tmp_path):
    tests = str(Path(__file__).parents[1])

    def start(resume: Path, output: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", CALIBRATION, tests, str(resume), str(output)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    begin = time.monotonic()
    whole = start(tmp_path / "whole", tmp_path / "wanted")
    assert whole.stdout is not None
    whole.stdout.readline()
    ready = time.monotonic()
    whole.communicate()
    seconds = time.monotonic() - ready
    assert whole.returncode == 0 and ready > begin
    wanted = (tmp_path / "wanted" / FILES[0]).read_bytes()

    def killed(seed: int) -> str:
        resume, output = tmp_path / f"resume_{seed}", tmp_path / f"output_{seed}"
        process = start(resume, output)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, seconds))
        process.kill()
        process.communicate()
        again = start(resume, output)
        _, errors = again.communicate()
        if again.returncode:
            return f"unclear error: {errors.decode()[-500:]}"
        return "used as it is" if (output / FILES[0]).read_bytes() == wanted else "silent difference"

    cases: list[tuple[str, Case]] = [("killed calibration", functools.partial(killed, seed)) for seed in range(20)]
    report("calibrations that are killed", run_all(cases, tmp_path, seconds=600))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no file that is always full")
def test_a_full_disk_is_one_error_and_the_old_model_stays(saved, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(saved[0], tmp_path / "model"))
    before = {name: (folder / name).read_bytes() for name in FILES}
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.suffix == ".tmp":
            write(path, data[: len(data) // 2])
            with open("/dev/full", "wb", buffering=0) as device:
                device.write(data)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save(load(folder), folder)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(saved, tmp_path):
    folder = Path(shutil.copytree(saved[0], tmp_path / "model"))
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=str(folder)):
            save(load(folder), folder)
    finally:
        folder.chmod(0o700)
    assert json.loads((folder / "config.json").read_text())
