"""examples/browser: the page answers in Chromium as Python does, on a phone's width and without a network."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.example_models import bundled, free_port, pictures, running
from PIL import Image

from ptq4vm.data import read_image, transform_for
from ptq4vm.onnx import export

pytest.importorskip("onnxscript")
BROWSER = Path(__file__).parents[2] / "examples/browser"
MODULES = Path(os.environ.get("PTQ4VM_NODE_MODULES", BROWSER / "node_modules"))
"""Folder of onnxruntime-web and playwright-core."""
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("node") and CHROMIUM and (MODULES / "playwright-core").is_dir()),
        reason="the page is tried with node, Chromium and playwright-core",
    ),
]


@pytest.fixture(scope="module")
def model():
    return bundled("vmamba_micro_32.cifar10")


@pytest.fixture(scope="module")
def site(model, tmp_path_factory):
    """A folder with the page, its model and one example."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(BROWSER, folder, ignore=shutil.ignore_patterns("node_modules", "model.*"), dirs_exist_ok=True)
    (folder / "node_modules").symlink_to(MODULES)
    path = export(model[1], folder / "model.onnx")
    shutil.copy(pictures(folder)[3], folder / "example0.jpg")
    describe = runpy.run_path(str(BROWSER / "prepare.py"))["describe"]
    (folder / "model.json").write_text(json.dumps(describe(path, ["example0.jpg"])))
    return folder


class Server(NamedTuple):
    """`python -m http.server` over the site."""

    address: str
    process: subprocess.Popen


@pytest.fixture
def server(site):
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", str(site)]
    with running(command, port, stderr=subprocess.DEVNULL) as process:
        yield Server(f"http://127.0.0.1:{port}/", process)


def visit(address, profile, paths, width=1100, **options):
    """Returns what the page said of the pictures, in a browser of that profile."""
    task = {"modules": str(MODULES), "chromium": CHROMIUM, "address": address, "profile": str(profile), "width": width}
    task |= {"pictures": [str(path) for path in paths]} | options
    script = Path(__file__).with_name("browser.mjs")
    done = subprocess.run(["node", script, json.dumps(task)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(model, path):
    original, quantized = model
    with torch.inference_mode():
        likely = quantized(transform_for(original)(read_image(str(path)))[None]).softmax(1)[0].topk(5)
    return {original.pretrained_cfg["label_names"][i]: float(p) for i, p in zip(*reversed(likely), strict=True)}


def test_it_answers_as_python_does_on_a_desktop_and_a_phone_and_offline(server, site, model, tmp_path):
    paths = pictures(tmp_path)
    seen = visit(server.address, tmp_path / "profile", paths, screenshot=str(tmp_path / "desktop.png"))
    assert all(method == "GET" and url.startswith((server.address, "blob:")) for method, url in seen["requests"])
    for path, answer in zip(paths, seen["answers"], strict=True):
        wanted = expected(model, path)
        assert answer["said"] == f"It looks like: {next(iter(wanted))}.", path.name
        assert [name for name, _ in answer["classes"]] == list(wanted), path.name
        assert [share for _, share in answer["classes"]] == pytest.approx(list(wanted.values()), abs=0.02), path.name
    name, size, elapsed, offline = seen["facts"]
    assert name == "vmamba_micro_32" and offline == "ready" and elapsed.endswith(" ms")
    assert size == f"{(site / 'model.onnx').stat().st_size / 1e6:.2f} MB, int8"

    phone = visit(
        server.address, tmp_path / "phone", paths[:1], width=360, dark=True, screenshot=str(tmp_path / "phone.png")
    )
    assert phone["overflow"] <= 0 and phone["answers"][0] == seen["answers"][0]

    server.process.terminate()
    server.process.wait(20)
    assert visit(server.address, tmp_path / "profile", paths)["answers"] == seen["answers"]


def test_what_goes_wrong_is_said_in_a_sentence(server, site, tmp_path):
    note = tmp_path / "note.jpg"
    note.write_text("no picture")
    good = pictures(tmp_path)[0]
    Image.new("L", (60_000, 1)).save(tmp_path / "strip.png")
    bad, strip, after = visit(server.address, tmp_path / "profile", [note, tmp_path / "strip.png", good])["answers"]
    assert strip["said"] == "The model could not answer: 60000 × 1 pixels are too long a strip"
    assert bad["said"].startswith("This is no picture") and bad["classes"] == []
    assert after["said"].startswith("It looks like")
    hidden = (site / "model.onnx").rename(site / "elsewhere")
    try:
        missing = visit(server.address, tmp_path / "other", [good])
    finally:
        hidden.rename(site / "model.onnx")
    assert missing["loaded"] == ("The model could not be loaded: model.onnx is not there. Make it with prepare.py.")
