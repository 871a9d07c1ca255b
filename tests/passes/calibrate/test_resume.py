import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers.small_models import LEARNED, blocks
from helpers.strategies import normal

from ptq4vm import calibrate, prepare
from ptq4vm.backend import native
from ptq4vm.files import replace_file
from ptq4vm.passes.calibrate.resume import LOCK, MANIFEST, Finished

X = normal(8, 5, 8)
TENSORS = {
    "scale": normal(3),
    "zero_point": torch.arange(3, dtype=torch.int32),
    "codes": torch.ones(2, 3, dtype=torch.int8),
    "scalar": torch.tensor(0.5),
    "empty": torch.zeros(0, 2),
    "half": torch.ones(1, dtype=torch.bfloat16),
}
REPORT = {"block": "layers.é", "linears": ["a"], "loss": 0.1}


def run(folder, model=None, x=X, config=LEARNED):
    return calibrate(prepare(model or blocks(), (X,), config), [x], resume_dir=folder, progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "resume"
    return folder, run(folder).state_dict()


@pytest.fixture
def folder(made, tmp_path):
    """The folder of a run that came to its end."""
    copied = tmp_path / "resume"
    copied.mkdir()
    for path in made[0].iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_blocks_are_taken_up_with_a_scalar_parameter_and_a_buffer(made, folder, monkeypatch):
    monkeypatch.setattr("ptq4vm.passes.calibrate.blockwise.learn_block", None)
    assert same(run(folder).state_dict(), made[1])


def test_no_half_files_are_left(folder):
    names = ["block_001.safetensors", "block_002.safetensors", MANIFEST, LOCK]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / LOCK).read_text() == ""
    assert json.loads((folder / MANIFEST).read_text())["torch"] == torch.__version__


# --- what a folder is bound to ---


def changed(name):
    model = blocks()
    tensor = model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name)
    tensor.data = tensor.data + 1
    return model


CHANGES = {
    "another config": {"config": lambda: LEARNED.w4a4(learning=LEARNED.learning, seed=1)},
    "other images": {"x": lambda: X.flip(0)},
    "other parameters": {"model": lambda: changed("layers.1.gain")},
    "other buffers or constants": {"model": lambda: changed("layers.0.scale")},
    "another graph": {"model": lambda: blocks(flow=lambda m, x: m.head(m.layers[1](m.layers[0](x)).amax(1)))},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_of_something_else_is_refused_and_named(folder, what):
    options = {key: make() for key, make in CHANGES[what].items()}
    with pytest.raises(ValueError, match=rf"holds a calibration of {what}; give resume_dir another folder or delete"):
        run(folder, **options)


def test_other_versions_kernels_and_threads_are_refused_and_named(folder, monkeypatch):
    monkeypatch.setattr("ptq4vm.__version__", "9.9")
    monkeypatch.setattr(native, "isa", lambda: "abacus")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    want = r"of ptq4vm .* \(this is 9\.9\), the kernels .* has abacus.*, \d+ threads \(this run has 77: call torch"
    with pytest.raises(ValueError, match=want):
        run(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": "0", "torch": "2.13.0"}'])
def test_a_damaged_manifest_is_an_error_that_says_so(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=rf"{MANIFEST} is .*delete"):
        run(folder)


def test_blocks_without_a_manifest_are_refused(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=rf"holds blocks without their {MANIFEST}.*delete this one"):
        run(folder)


# --- what a block is bound to ---


@pytest.fixture
def finished(tmp_path):
    found = Finished(tmp_path, "run")
    found.write(3, TENSORS, REPORT)
    return found


def test_a_block_comes_back_as_it_was(finished):
    tensors, report = finished.read(3)
    assert same(tensors, TENSORS) and report == REPORT
    assert finished.read(2) is None


def test_a_flipped_bit_anywhere_is_refused(finished, tmp_path):
    (path,) = tmp_path.glob("block_003.safetensors")
    data = path.read_bytes()
    taken = []
    for place in range(0, len(data) * 8, 7):  # every bit of eight in turn
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            finished.read(3)
            taken.append(place)
        except ValueError as error:
            assert "block_003.safetensors cannot be read" in str(error) and "delete it" in str(error)
    assert not taken


def test_what_is_cut_or_longer_is_refused(finished, tmp_path):
    (path,) = tmp_path.glob("block_003.safetensors")
    data = path.read_bytes()
    for damaged in (*(data[:length] for length in range(0, len(data), 9)), data[:-1], data + b" ", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot be read.*delete it and calibrate again"):
            finished.read(3)


def test_the_block_of_another_place_or_run_is_refused(finished, tmp_path):
    data = (tmp_path / "block_003.safetensors").read_bytes()
    (tmp_path / "block_004.safetensors").write_bytes(data)
    for reader, index in ((finished, 4), (Finished(tmp_path, "another"), 3)):
        with pytest.raises(ValueError, match="it is not what this run wrote as that block"):
            reader.read(index)


def test_calibration_refuses_a_damaged_block(folder):
    path = folder / "block_002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read.*delete it and calibrate again"):
        run(folder)


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "x"
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("sync") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or rename(*paths))
    replace_file(path, lambda temporary: temporary.write_bytes(b"1"))
    assert calls[:2] == ["sync", "rename"] and path.read_bytes() == b"1"


# --- two runs ---


def test_a_folder_in_use_is_refused_until_its_process_is_dead(made, folder):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", hold, folder / LOCK], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        (folder / LOCK).write_text(f"process {other.pid} on here")
        with pytest.raises(ValueError, match=rf"is in use by process {other.pid} on here; wait for it, or"):
            run(folder)
        other.send_signal(signal.SIGKILL)
    assert same(run(folder).state_dict(), made[1])


def test_the_lock_names_this_process_while_it_runs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ptq4vm.passes.calibrate.blockwise.learn_block", lambda *_: seen.append((tmp_path / "a" / LOCK).read_text())
    )
    run(tmp_path / "a")
    assert seen == [f"process {os.getpid()} on {os.uname().nodename}"] * 2
    with (tmp_path / "a" / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_a_killed_run_left_half_written_is_cleared(folder):
    (folder / ".block_001.safetensors.123.tmp").write_bytes(b"half")
    run(folder)
    assert not list(folder.glob(".*"))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give it a folder"):
        run(tmp_path / "file")
