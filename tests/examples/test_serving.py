"""examples/serving: a real server process, asked over HTTP, answers as Python does."""

import io
import json
import os
import runpy
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.example_models import bundled, free_port, pictures, running
from PIL import Image

from ptq4vm.data import read_image, transform_for
from ptq4vm.models import create_model
from ptq4vm.onnx import export

pytest.importorskip("onnxscript")
SERVING = Path(__file__).parents[2] / "examples/serving"
PYTHON = os.environ.get("PTQ4VM_SERVING_PYTHON", sys.executable)
"""An interpreter with the packages of requirements.txt; it needs no torch."""
needs_server = pytest.mark.skipif(
    subprocess.run([PYTHON, "-c", "import fastapi, uvicorn, onnxruntime"], capture_output=True).returncode != 0,
    reason="the server needs fastapi, uvicorn and onnxruntime",
)


@pytest.fixture(scope="module")
def model():
    return bundled("vmamba_micro_32.cifar10")


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    path = export(model[1], tmp_path_factory.mktemp("serving") / "model.onnx", "onnxruntime")
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"MODEL": str(path)}
    command = [PYTHON, "-m", "uvicorn", "app:app", "--port", str(port), "--log-level", "warning"]
    with running(command, port, cwd=SERVING, env=environment):
        yield f"http://127.0.0.1:{port}/classify"


def ask(address, data):
    """Returns the status and the answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, method="POST"), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected(model, path):
    """Returns the five likeliest classes and their probabilities, by torch and timm."""
    original, quantized = model
    with torch.inference_mode():
        likely = quantized(transform_for(original)(read_image(str(path)))[None]).softmax(1)[0].topk(5)
    names = original.pretrained_cfg["label_names"]
    return [names[i] for i in likely.indices], likely.values.numpy()


@pytest.mark.parametrize("name", ["vmamba_micro_32.cifar10", "vim_tiny_patch16_224", "mamba_vision_T", "squash"])
def test_pictures_are_prepared_as_timm_does(name, tmp_path):
    module = runpy.run_path(str(SERVING / "pictures.py"))
    model = create_model("vim_tiny_patch16_224" if name == "squash" else name)
    if name == "squash":
        model.pretrained_cfg["crop_mode"] = "squash"
    grey = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32
    Image.fromarray(grey).save(tmp_path / "sixteen.png")
    for path in [*pictures(tmp_path), tmp_path / "sixteen.png"]:
        pixels = module["prepare"](module["decode"](path.read_bytes()), model.pretrained_cfg)
        assert torch.equal(torch.from_numpy(pixels), transform_for(model)(read_image(str(path)))), path.name


@pytest.mark.slow
@needs_server
def test_pictures_of_any_size_and_kind_get_pythons_answers(address, model, tmp_path):
    for path in pictures(tmp_path):
        status, found = ask(address, path.read_bytes())
        names, probabilities = expected(model, path)
        assert status == 200 and [each["name"] for each in found["classes"]] == names, path.name
        # a code at a tie may round the other way: the runtime's norms and scans sum in another order
        assert np.allclose([each["probability"] for each in found["classes"]], probabilities, atol=0.01), path.name


@pytest.mark.slow
@needs_server
def test_pictures_that_come_together_run_together(address, tmp_path):
    crowd = [path.read_bytes() for path in pictures(tmp_path)] * 3
    alone = [ask(address, data)[1]["classes"] for data in crowd]
    with ThreadPoolExecutor(24) as pool:
        together = [answer for _, answer in pool.map(lambda data: ask(address, data), crowd)]
    assert max(answer["together"] for answer in together) > 1
    for one, other in zip(alone, together, strict=True):
        assert [each["name"] for each in one] == [each["name"] for each in other["classes"]]
        for a, b in zip(one, other["classes"], strict=True):
            assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)


@pytest.mark.slow
@needs_server
def test_what_is_no_picture_gets_a_reason(address, tmp_path):
    picture = pictures(tmp_path)[0].read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (10_000, 8_000)).save(bomb, "PNG")
    strip = io.BytesIO()
    Image.new("L", (1_000_000, 1)).save(strip, "PNG")
    for data, status, reason in (
        (strip.getvalue(), 422, "1000000 × 1 pixels are too long a strip"),
        (b"", 422, "none of BMP"),
        (b"GIF, or not", 422, "none of BMP"),
        (picture[: len(picture) // 2], 422, "truncated"),
        (bomb.getvalue(), 422, "10000 × 8000 pixels"),
        (bytes(20_000_001), 413, "20000000 bytes"),
    ):
        code, answer = ask(address, data)
        assert code == status and reason in answer["detail"], (code, answer)
    assert ask(address, picture)[0] == 200  # and lives on
