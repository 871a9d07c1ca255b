"""Runs what the README runs."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_runs_and_agrees_with_floating_point(tmp_path):
    said = run(ROOT / "examples/quickstart.py", cwd=tmp_path)
    assert int(re.search(r"(\d+)%", said)[1]) >= 90
    assert (tmp_path / "vim-nano-w4a4" / "config.json").exists()


def test_the_readmes_ten_lines_are_the_quickstarts():
    """Line by line, up to comments and the learning that the quickstart shortens."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    quickstart = (ROOT / "examples/quickstart.py").read_text()
    calls = [
        "timm.create_model(",
        "calibration_batches(open_dataset(",
        "ptq4vm.prepare(",
        "ptq4vm.calibrate(prepared, images)",
    ]
    calls += ["ptq4vm.convert(prepared)", 'ptq4vm.save(quantized, "vim-nano-w4a4")', 'ptq4vm.load("vim-nano-w4a4")']
    assert all(call in code and call in quickstart for call in calls)


@pytest.mark.slow
def test_making_the_hard_model_gives_the_bundled_bytes(tmp_path):
    run(ROOT / "examples/training/hard.py", "--output", tmp_path, cwd=tmp_path)
    name = "vim_nano_patch4_32.digits_hard.safetensors"
    assert (tmp_path / name).read_bytes() == (ROOT / "ptq4vm/models/pretrained" / name).read_bytes()


def test_the_demo_writes_table_numbers_and_picture(tmp_path, monkeypatch, capsys):
    """The demo itself, with two rungs, one number of bits and one epoch."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    demo = importlib.import_module("demo")
    chosen = ("MinMax", "PTS + truncation + JLSS")
    monkeypatch.setattr(demo, "LADDER", {name: demo.LADDER[name] for name in chosen})
    monkeypatch.setattr(demo, "SHORT", {4: 1})
    monkeypatch.setattr(demo, "MODELS", {"hard": demo.MODELS["hard"]})
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    demo.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["FP32", *chosen]
    assert rows[1]["top1"] < 50 < 95 < rows[2]["top1"]
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "PTS + truncation + JLSS" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_demo_runs(tmp_path):
    run(ROOT / "examples/demo.py", "--output", tmp_path, cwd=tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 32
