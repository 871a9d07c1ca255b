"""Bad inputs of the command line, each of which must end with one line that says so.

python -m pytest -m slow -s tests/hostile/test_inputs.py
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.damaged_images import KINDS, damaged
from helpers.hostile_outcomes import Case, of_command, report, run_all
from helpers.public_models import create
from PIL import Image
from safetensors.torch import save_file

from ptq4vm.cli import main as cli

MODEL = "vim_nano_patch4_32"
RANDOM = ("--checkpoint", "random")
CONFIGS = {
    "empty": "",
    "brace": "{",
    "list": "[4]",
    "null": "null",
    "deep": "[" * 100_000,
    "unknown key": '{"weigth_bits": 4}',
    "nan": '{"weight_bits": NaN}',
    "infinity": '{"weight_bits": 1e400}',
    "text": '{"weight_bits": "4"}',
    "zero": '{"weight_bits": 0}',
    "many": '{"weight_bits": 99}',
    "fraction": '{"weight_bits": 4.5}',
    "seed": f'{{"seed": {2**80}}}',
    "long": f'{{"weight_bits": {"9" * 5000}}}',
    "granularity": '{"granularity": "per_planet"}',
    "section": '{"weights": [4]}',
    "bits of a section": '{"weights": {"bits": 99}}',
    "both layouts": '{"weight_bits": 4, "weights": {"bits": 4}}',
    "version": '{"format_version": 9}',
    "scheme": '{"scheme": ["affine"]}',
    "learning": '{"learning": {"epochs": -1}}',
}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def folders(root: Path, classes: int = 10, split: str = "val", each: int = 1) -> Path:
    """Grey images, `each` in every class folder."""
    for number in range(classes):
        folder = root / split / f"class_{number:02d}"
        folder.mkdir(parents=True)
        for image in range(each):
            Image.new("L", (40, 40), 20 * number + image).save(folder / f"{image}.png")
    return root


def data(root: Path) -> Iterator[tuple[str, list[object]]]:
    """Folders of images, by what is wrong with them."""

    def evaluated(folder: Path, *more: object) -> list[object]:
        return ["evaluate", MODEL, *RANDOM, "--data-dir", folder, *more]

    (root / "empty").mkdir()
    (root / "file").touch()
    (root / "hidden" / ".git" / "a").mkdir(parents=True)
    (root / "no images" / "a").mkdir(parents=True)
    (root / "flat").mkdir()
    Image.new("L", (4, 4)).save(root / "flat" / "a.png")
    (root / "link").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    for name in ("nowhere", "empty", "file", "hidden", "no images", "flat", "link", "loop", "x" * 300, "\x1b[31m\n"):
        yield "folders", evaluated(root / name)
    for count in (1, 9, 11):
        yield "classes", evaluated(folders(root / f"{count} classes", count))
    yield "classes", evaluated(folders(root / "only train", split="train"), "--split", "val")
    stranger = folders(folders(root / "stranger", split="train"), 9)
    (stranger / "val" / "class_09").mkdir()
    os.rename(stranger / "val" / "class_08", stranger / "val" / "other")
    yield "classes", evaluated(stranger)
    ids = folders(root / "ids", 9)
    os.rename(ids / "val" / "class_00", ids / "val" / "n01440764")
    yield "classes", evaluated(ids)
    for kind in sorted({*KINDS} - {"a folder"}):  # that one is no image, and harmless
        folder = folders(root / f"image {kind}")
        os.remove(folder / "val" / "class_03" / "0.png")
        damaged(folder / "val" / "class_03" / "\x1b[2Jphoto.png", kind)
        yield "images", evaluated(folder)
    good = folders(root / "good", each=2)
    for option, *values in (
        ("--split", "eval", "TEST", "train", "../val"),
        ("--limit", "0", "-1", "few", "1e3", 10**30),
        ("--batch-size", "0", "-4", "2.5", 10**30),
        ("--against", "vim_huge", "/dev/null", root / "nowhere", "vim_micro_patch4_32.roman"),
    ):
        for value in values:
            yield "options", evaluated(good, option, value)


def models(root: Path, saved: Path) -> Iterator[tuple[str, list[object]]]:
    """Names, files of weights and folders of models."""
    digits = ("--data-dir", "digits", "--limit", "4")
    names = ["vim_huge", "..", "/dev/null", "hf-hub:a/b", "local-dir:/tmp", f"{MODEL}.roman", f"{MODEL}/", "x" * 5000]
    for name in (*names, "\x1b[31m", "ünïcödé", "--", "%s{0}", "vim_tiny_patch16_224", root):
        yield "names", ["evaluate", *digits, "--", name] if name != "--" else ["evaluate", *digits]
    torch.manual_seed(0)
    state = create(MODEL).state_dict()
    written = {
        "nan.pth": {**state, "head.bias": torch.full((10,), torch.nan)},
        "integers.pth": {name: value.int() for name, value in state.items()},
        "booleans.pth": {**state, "head.bias": torch.ones(10, dtype=torch.bool)},
        "sparse.pth": {**state, "head.bias": torch.ones(10).to_sparse()},
        "complex.pth": {**state, "head.bias": torch.ones(10, dtype=torch.complex64)},
        "less.pth": {name: value for name, value in state.items() if not name.startswith("head")},
        "more.pth": {**state, "\x1b[31m.weight": torch.ones(3)},
        "other classes.pth": create(MODEL, num_classes=7).state_dict(),
        "other model.pth": create("vmamba_nano_32").state_dict(),
        "a whole model.pth": torch.nn.Linear(2, 2),
        "nothing.pth": {},
        "a list.pth": [state],
        "a number.pth": 3,
    }
    for name, content in written.items():
        torch.save(content, root / name)
    junk = {"empty.pth": b"", "html.pth": b"<html>", "json.safetensors": b"{}", "zip.pth": b"PK\3\4"}
    for name, content in junk.items():
        (root / name).write_bytes(content)
    os.mkfifo(root / "pipe.pth")
    files = [root / name for name in (*written, *junk, "pipe.pth", "missing.pth", "folder")]
    (root / "folder").mkdir()
    for file in (*files, Path("/dev/null"), Path("/dev/zero"), saved / "model.safetensors"):
        yield "weights", ["evaluate", MODEL, *digits, "--checkpoint", file]
    torch.save(state, root / "good.pth")
    yield "weights", ["evaluate", MODEL, *digits, "--checkpoint", root / "good.pth", "--ema"]
    yield "weights", ["evaluate", MODEL, *digits, *RANDOM, "--ema"]
    yield "weights", ["evaluate", saved, *digits, "--checkpoint", root / "good.pth"]
    for name, content in (
        ("config.json", b""),
        ("config.json", b"[]"),
        ("config.json", b"{}"),
        ("config.json", b"\xff"),
    ):
        copy = shutil.copytree(saved, root / f"saved {content!r}")
        (copy / name).write_bytes(content)
        yield "saved models", ["evaluate", copy, *digits]
    copy = shutil.copytree(saved, root / "without weights")
    (copy / "model.safetensors").unlink()
    yield "saved models", ["inspect", copy]
    copy = shutil.copytree(saved, root / "weights without a graph")
    save_file(state, copy / "model.safetensors")
    yield "saved models", ["inspect", copy]
    for name in ("config.json", "model.safetensors"):
        copy = shutil.copytree(saved, root / f"half {name}")
        (copy / name).write_bytes((copy / name).read_bytes()[:100])
        yield "saved models", ["benchmark", copy, "--repeats", "1"]


def others(root: Path, saved: Path) -> Iterator[tuple[str, list[object]]]:
    """Configs, outputs and options."""
    quantize = ["quantize", MODEL, *RANDOM, "--data-dir", "digits", "--images", "4"]
    for name, text in CONFIGS.items():
        (root / f"{name}.json").write_text(text)
    (root / "bytes.json").write_bytes(b"\xff\xfe")
    (root / "folder.json").mkdir()
    configs = [root / f"{name}.json" for name in (*CONFIGS, "bytes", "folder", "missing")]
    for config in (*configs, "w9a9", "minmax0", "minmax9", "4", "\x1b[31m", "best"):
        yield "configs", [*quantize, "--output", root / "out", "--config", config]
    (root / "taken").mkdir()
    (root / "taken" / "config.json").write_text("{}")
    (root / "file").touch()
    for output in (root / "file", root / "file" / "out", root / "taken", "/dev/null", "/proc/out", "x" * 300):
        yield "outputs", [*quantize, "--output", output]
    for folder in (root / "file", root / "file" / "blocks", root / "out", root / "out" / "blocks", "/proc/blocks"):
        yield "outputs", [*quantize, "--output", root / "out", "--resume-dir", folder]
    benchmark = ["benchmark", MODEL, "--repeats", "1"]
    for option, *values in (
        ("--csv", root, "/dev/null", "/dev/full", "/proc/a.csv", root / "file" / "a.csv", "x" * 300),
        ("--picture", root, "a.txt", "a", "/proc/a.png", root / "file" / "a.png"),
        ("--kind", "fastest", "\x1b[31m", "saved"),
        ("--against", "quantized", "resnet18", "fused fused"),
        ("--threads", "0", "-1", "100000", "two"),
        ("--batch-size", "0", "1.5", 10**12),
        ("--repeats", "0", "nan"),
    ):
        for value in values:
            words = str(value).split() if option == "--against" else [value]
            yield "outputs" if option in ("--csv", "--picture") else "options", [*benchmark, option, *words]
    for output in (root / "a.zip", root, root / "file" / "a.pt2", "/proc/a.pt2", "/dev/null"):
        yield "outputs", ["export", saved, output]
    yield "outputs", ["export", MODEL, root / "a.pt2"]
    for more in (("--graph", "--data-dir", "digits"), ("--against", MODEL), ("--output", root / "out"), ("--ema",)):
        yield "options", ["inspect", saved, *more]
    for more in (
        ("--images", 451),
        ("--output", root / "file"),
        ("--against", saved),
        ("--against", "vim_huge", *RANDOM),
    ):
        yield "options", ["inspect", saved, "--data-dir", "digits", *more]
    for images in (1348, 10**9):
        yield "options", [*quantize[:-1], images, "--output", root / "out"]
    for seed in (-1, 2**63, "a"):
        yield "options", [*quantize, "--output", root / "out", "--seed", seed]


def refused(argv: list[object]) -> Case:
    """A bad input that is used as if it were good is a silent difference."""

    def case() -> str:
        outcome = of_command(argv)
        return outcome if outcome != "used as it is" else f"silent difference: used {argv!a}"

    return case


def test_a_bad_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    saved = tmp_path / "saved"
    minmax = ("--config", "minmax8", "--images", "4", "--batch-size", "4")
    assert cli.main(["quantize", MODEL, *RANDOM, "--data-dir", "digits", "--output", str(saved), *minmax]) == 0
    for name in ("data", "models", "others", "log"):
        (tmp_path / name).mkdir()
    found = [*data(tmp_path / "data"), *models(tmp_path / "models", saved), *others(tmp_path / "others", saved)]
    outcomes = run_all([(kind, refused(argv)) for kind, argv in found], tmp_path / "log", at_once=20)
    (tmp_path / "outcomes.json").write_text(json.dumps(outcomes, indent=1))
    assert len(outcomes) >= 80 and np.all([row["kind"] for row in outcomes])
    report("bad inputs of the command line", outcomes)
