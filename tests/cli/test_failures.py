"""Mistakes of users and machines, each told in one line and before any work where that can be known."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.cli_commands import MODEL, calibration

import ptq4vm
from ptq4vm import doctor
from ptq4vm.cli import sources
from ptq4vm.cli.main import main

COMMANDS = {
    "quantize": [MODEL, "--data-dir", "digits", "--output", "out"],
    "evaluate": [MODEL, "--data-dir", "digits"],
    "benchmark": [MODEL],
    "inspect": ["out"],
    "export": ["out", "out.pt2"],
}
WORDS = {
    "quantize": ("--data-dir", "--output", "--checkpoint", "--config", "--resume-dir"),
    "evaluate": ("--data-dir", "--checkpoint", "--split", "--against"),
    "benchmark": ("--kind", "--against", "--csv", "--picture"),
    "inspect": ("--data-dir", "--split", "--against", "--checkpoint", "--output"),
    "export": ("--runtime",),
}


@pytest.fixture
def no_work(monkeypatch):
    """A test that goes on to load a model fails."""

    def work(*args, **options):
        raise AssertionError("the work began")

    for name in ("named_model", "open_model", "open_both", "is_model_folder"):
        monkeypatch.setattr(sources, name, work)


@pytest.mark.parametrize("word", ["", " ", "\t\n", "a\0b"])
@pytest.mark.parametrize("command", COMMANDS)
def test_empty_words_are_wrong_usage(capsys, command, word):
    places = [[word, *COMMANDS[command][1:]], *([*COMMANDS[command], option, word] for option in WORDS[command])]
    for argv in places:
        with pytest.raises(SystemExit) as stop:
            main([command, *argv])
        assert stop.value.code == 2 and "must not be empty, nor hold a null" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ("benchmark", MODEL, "--threads", "100000"),
        ("benchmark", MODEL, "--batch-size", "10000000000"),
        (*calibration("out"), "--seed", str(2**64)),
    ],
)
def test_counts_that_no_machine_has_are_wrong_usage(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "at most" in capsys.readouterr().err


OUTPUTS = [
    ("quantize", "--output", "file", "file is a file; choose another folder"),
    ("quantize", "--output", "file/out", "file/out cannot be made: .*file is no folder"),
    ("quantize", "--output", "x" * 300, "File name too long"),
    ("quantize", "--output", "x" * 250, "File name too long"),  # under its temporary name
    ("quantize", "--resume-dir", "file", "file is a file; choose another folder"),
    ("quantize", "--resume-dir", "file/blocks", "file/blocks cannot be made: .*file is no folder"),
    ("quantize", "--resume-dir", "out", "are one in the other; choose two folders"),
    ("quantize", "--resume-dir", "out/blocks", "are one in the other; choose two folders"),
    ("benchmark", "--csv", "folder", "folder is a folder; give the name of a file"),
    ("benchmark", "--csv", "file/a.csv", "file/a.csv cannot be made: .*file is no folder"),
    ("benchmark", "--csv", "pipe", "pipe is no regular file"),
    ("benchmark", "--csv", "x" * 300, "File name too long"),
    ("benchmark", "--picture", "folder.png", "folder.png is a folder; give the name of a file"),
    ("benchmark", "--picture", "file/a.svg", "file/a.svg cannot be made: .*file is no folder"),
]


@pytest.mark.parametrize(("command", "option", "value", "message"), OUTPUTS)
def test_an_output_that_cannot_be_is_told_before_the_work(
    run, tmp_path, monkeypatch, no_work, command, option, value, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    Path("folder.png").mkdir()
    os.mkfifo("pipe")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(command, *COMMANDS[command], option, value)
    assert (code, out) == (1, "") and err.startswith("ptq4vm: error: ") and err.count("\n") == 1
    assert re.search(message, err)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["quantize", "benchmark", "export"])
def test_a_disk_that_is_full_is_told_before_the_work(run, tmp_path, monkeypatch, no_work, command):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "is_model_folder", lambda name: True)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    more = ("--csv", "times.csv") if command == "benchmark" else ()
    code, _, err = run(command, *COMMANDS[command], *more)
    assert code == 1 and "cannot be written: No space left on device" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"), [("out.zip", "ends in .onnx, of a compiled package in .pt2"), ("", "is a folder")]
)
def test_an_export_is_refused_before_the_work(run, saved, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(ptq4vm, "load", None)
    (tmp_path / "folder.pt2").mkdir()
    code, _, err = run("export", saved, tmp_path / (name or "folder.pt2"))
    assert code == 1 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "kept"), [((), "nothing is kept"), (("--resume-dir", "blocks"), "are kept in blocks")]
)
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_told_as_an_interrupt_is(run, tmp_path, monkeypatch, config, more, kept, number, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ptq4vm, "prepare", lambda *args: signal.raise_signal(number))
    handler = signal.getsignal(signal.SIGTERM)
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore them
    try:
        code, out, err = run(*calibration(tmp_path / "out", "digits", config, *more))
    finally:
        signal.signal(signal.SIGINT, interrupts)
    assert (code, out) == (expected, "") and kept in err.splitlines()[-1]
    assert signal.getsignal(signal.SIGTERM) is handler


ERRORS = [
    (MemoryError(), "out of memory"),
    (
        RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 9 bytes"),
        "9 bytes",
    ),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "take fewer images at once"),
    (OSError(errno.ENOSPC, "No space left on device"), "it was writing out or blocks"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "out/model"), "out/model"),
    (RuntimeError("PytorchStreamWriter failed writing file data/0"), "it was writing out or blocks"),
    (EOFError("ran out of input"), "ran out of input"),
    (RecursionError("maximum recursion depth exceeded"), "recursion"),
    (ValueError("two\nlines \x1b[31m\udcff"), r"two lines \x1b[31m\udcff"),
]


@pytest.mark.parametrize(("error", "message"), ERRORS)
def test_what_the_machine_lacks_is_one_line(run, tmp_path, monkeypatch, config, error, message):
    def fail(*args, **options):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ptq4vm, "prepare", fail)
    code, out, err = run(*calibration("out", "digits", config, "--resume-dir", "blocks"))
    *progress, last = err.splitlines()
    assert (code, out) == (1, "") and all(line.endswith(" …") for line in progress)
    assert last.startswith("ptq4vm: error: ") and message in last


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), TypeError("no"), AttributeError("no"), KeyError("no")]
)
def test_our_own_mistakes_keep_their_traceback(monkeypatch, error):
    monkeypatch.setattr(doctor, "diagnose", lambda: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        main(["doctor"])


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("stream", "message"), [(Full(), "No space left on device"), (None, "it is closed")])
def test_a_result_that_nobody_can_read_is_an_error(capsys, monkeypatch, stream, message):
    monkeypatch.setattr(sys, "stdout", stream)
    with contextlib.suppress(OSError):
        assert main(["doctor"]) == 1
    monkeypatch.undo()
    assert f"cannot be written to standard output: {message}" in " ".join(capsys.readouterr().err.split()).replace(
        "[Errno 28] ", ""
    )


HOSTILE = "\x1b[2J\x1b]0;title\x07\r\n\x85\u202ered"


def test_names_from_files_do_not_reach_the_terminal_as_they_are(run, tmp_path):
    path = tmp_path / f"{HOSTILE}.pth"
    torch.save({HOSTILE: torch.ones(1), f"{HOSTILE}2\udcff": torch.full((1,), torch.nan)}, path)
    for argv in (("inspect", path), ("evaluate", MODEL, "--data-dir", "digits", "--checkpoint", path)):
        code, out, err = run(*argv)
        assert code in (0, 1)
        assert all(char.isprintable() or char == "\n" for char in out + err), ascii(out + err)
        assert r"\x1b[2J" in out + err
    result = json.loads(run("inspect", path, "--json")[1])
    assert result["file"] == str(path) and result["nonfinite"] == [f"{HOSTILE}2\udcff"]


def test_wrong_usage_does_not_reach_the_terminal_as_it_is(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", HOSTILE])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_whose_logits_are_not_finite_is_shown(run, photos, monkeypatch, value):
    opened = sources.open_model

    def broken(*args):
        model = opened(*args)
        with torch.no_grad():
            model.head.bias[3] = value
        return model

    monkeypatch.setattr(sources, "open_model", broken)
    argv = ("evaluate", MODEL, "--data-dir", photos, "--against", MODEL, "--checkpoint", "random")
    code, out, _ = run(*argv)
    assert code == 0 and "not finite" in out and "20 of 20 images hold NaN or infinity" in out
    result = json.loads(run(*argv, "--json")[1], parse_constant=None)
    assert (result["nonfinite"], result["agreement"], result["divergence"], result["loss"]) == (20, 0, None, None)
