"""Laws of a saved folder: its contents, who may write it, and what a reader finds whatever happens to the writer."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from helpers.strategies import normal
from safetensors.torch import load_file
from torch import nn

import ptq4vm
import ptq4vm.models  # adds vim_* to timm's registry
from ptq4vm import Learning, QuantConfig, convert, load, save
from ptq4vm import saving as module
from ptq4vm.saving import CheckpointError

W4A4 = QuantConfig.w4a4(learning=Learning(epochs=1))
W8A8 = QuantConfig()
FILES = ["config.json", "model.safetensors"]


@pytest.fixture
def saved(roads, tmp_path):
    return save(convert(roads.calibrated(W4A4)), tmp_path / "model")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_loaded_model_is_the_saved_one(roads, images, saved):
    assert torch.equal(load(saved)(images), convert(roads.calibrated(W4A4))(images))


def test_saving_what_was_loaded_gives_the_same_bytes(saved, tmp_path):
    assert contents(save(load(saved), tmp_path / "again")) == contents(saved)


def test_four_bit_weights_take_half_a_byte(roads, tmp_path):
    sizes = {}
    for name, config in (("w4a4", W4A4), ("w8a8", W8A8)):
        save(convert(roads.calibrated(config)), tmp_path / name)
        found = load_file(tmp_path / name / "model.safetensors")
        sizes[name] = sum(value.nbytes for key, value in found.items() if key.endswith(".weight_q"))
    assert sizes["w4a4"] == sizes["w8a8"] / 2


# --- what is written ---


def test_the_folder_holds_two_files_and_no_pickle(saved):
    assert names(saved) == FILES
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "ptq4vm" and config["format_version"] == 3
    assert config["config"] == W4A4.to_dict()
    assert [linear["tokens"] for linear in config["linears"]] == [17] * 12


def test_config_json_tells_timms_name_and_what_differs_from_it(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", num_classes=7, depth=1, img_size=(16, 32), in_chans=1)
    x = normal(2, 1, 16, 32)
    quantized = ptq4vm.quantize(model, [x], QuantConfig(), progress=False)
    config = json.loads((save(quantized, tmp_path / "model") / "config.json").read_text())
    assert config["architecture"] == "vim_nano_patch4_32" and config["num_classes"] == 7
    assert config["model_args"]["depth"] == 1 and config["pretrained_cfg"]["input_size"] == [1, 16, 32]


def test_loading_never_unpickles(saved, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    load(saved)


def test_a_quantized_model_is_replaced_by_the_next(roads, images, saved):
    quantized = convert(roads.calibrated(W8A8))
    save(quantized, saved)
    assert torch.equal(load(saved)(images), quantized(images))
    assert names(saved.parent) == ["model"] and names(saved) == FILES


def test_an_empty_folder_and_missing_parents_are_no_obstacle(roads, tmp_path):
    (tmp_path / "empty").mkdir()
    quantized = convert(roads.calibrated(W4A4))
    assert names(save(quantized, tmp_path / "empty")) == FILES
    assert names(save(quantized, tmp_path / "a" / "b" / "c")) == FILES


def test_other_files_in_the_folder_stay_as_they_are(roads, saved, tmp_path):
    fresh = tmp_path / "clone"
    for folder in (saved, fresh):
        (folder / ".git").mkdir(parents=True)
        (folder / ".git" / "HEAD").write_text("ref")
        for name in ("README.md", ".gitattributes", "model.onnx"):
            (folder / name).write_text("mine")
        save(convert(roads.calibrated(W8A8)), folder)
        assert {(folder / name).read_text() for name in ("README.md", ".gitattributes", "model.onnx")} == {"mine"}
        assert (folder / ".git" / "HEAD").read_text() == "ref" and load(folder)


@pytest.mark.parametrize("failing", FILES)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_when_saving_fails_an_old_or_the_new_model_is_there_whole(roads, images, saved, monkeypatch, failing, error):
    models = [convert(roads.calibrated(config))(images) for config in (W4A4, W8A8)]
    replace = os.replace

    def fail(source, target):
        if str(target).endswith(failing):
            raise error
        replace(source, target)

    monkeypatch.setattr("ptq4vm.files.os.replace", fail)
    with pytest.raises(type(error)):
        save(convert(roads.calibrated(W8A8)), saved)
    assert torch.equal(load(saved)(images), models[failing == "config.json"])
    assert names(saved) == FILES


WRITER = """
import sys, torch, ptq4vm
models = [ptq4vm.load(folder) for folder in sys.argv[2:4]]
print("ready", flush=True)
while True:
    for model in models:
        ptq4vm.save(model, sys.argv[1])
"""


def test_a_reader_beside_a_writer_that_is_killed_finds_a_whole_model(roads, images, tmp_path, caplog):
    wanted = []
    for name, config in (("one", W4A4), ("two", W8A8)):
        quantized = convert(roads.calibrated(config))
        save(quantized, tmp_path / name)
        wanted.append(quantized(images))
    folder = save(quantized, tmp_path / "model")
    command = [sys.executable, "-c", WRITER, *(str(tmp_path / name) for name in ("model", "one", "two"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        found, end = set(), time.monotonic() + 3
        while time.monotonic() < end:
            y = load(folder)(images)
            found.add(next(i for i, logits in enumerate(wanted) if torch.equal(y, logits)))
        writer.send_signal(signal.SIGKILL)
    assert found == {0, 1}  # the writer did write
    assert any(torch.equal(load(folder)(images), logits) for logits in wanted)


def test_leftovers_of_a_killed_process_are_named_and_left(roads, saved, caplog):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    inside = saved / f".model.safetensors.{dead.pid}.tmp"
    beside = saved.parent / f".model.{dead.pid}.old"
    inside.write_bytes(b"half")
    beside.mkdir()
    alive = saved / f".model.safetensors.{os.getpid()}0.tmp"
    with caplog.at_level(logging.WARNING, "ptq4vm"):
        save(convert(roads.calibrated(W8A8)), saved)
    for path in (inside, beside):
        assert f"{path} was left by a process that was killed" in caplog.text and path.exists()
    assert str(alive) not in caplog.text
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"has no model\.safetensors; a process that was killed .*{dead.pid}"):
        load(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["{}", '{"architecture": "resnet50", "num_classes": 1000}', "precious"])
def test_another_models_files_are_not_replaced(roads, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match=rf"has a {name} that ptq4vm did not write; choose another folder"):
        save(convert(roads.calibrated(W4A4)), tmp_path)
    assert (tmp_path / name).read_text() == text and names(tmp_path) == [name]


def test_a_file_in_the_way_is_an_error_and_stays(roads, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match="model is a file"):
        save(convert(roads.calibrated(W4A4)), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_only_lowered_models_are_saved(roads, tmp_path):
    for gm in (roads.calibrated(W4A4), convert(roads.calibrated(W4A4), lower=False)):
        with pytest.raises(ValueError, match=r"only lowered models are saved.*without lower=False"):
            save(gm, tmp_path / "model")
    with pytest.raises(ValueError, match="a fused model is laid out for this machine"):
        save(ptq4vm.fuse(convert(roads.calibrated(W4A4))), tmp_path / "model")
    with pytest.raises(TypeError, match="expected a graph from"):
        save(nn.Linear(2, 2), tmp_path / "model")
    assert not list(tmp_path.iterdir())


# --- what cannot be loaded ---


def refused(folder, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


def edit(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("whole", [True, False])
def test_a_missing_model_is_an_error(saved, whole):
    for path in saved.iterdir():
        if whole or path.name == "model.safetensors":
            path.unlink()
    refused(saved, r"is not a saved model: it has no model\.safetensors")


def test_the_model_alone_is_enough(roads, images, saved):
    (saved / "config.json").unlink()
    assert torch.equal(load(saved)(images), convert(roads.calibrated(W4A4))(images))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_an_error(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, "(truncated|corrupt).*copy the folder again or quantize the model again")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"a": 1}', "\x00\xff"])
def test_a_config_that_is_no_config_is_an_error(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    refused(saved, r"config\.json beside it is corrupt.*delete it")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["quantization_config"]["config"]["weights"].update(bits=8),
        lambda config: config["quantization_config"].update(format_version=99),
        lambda config: config["quantization_config"]["linears"][0].pop("tokens"),
        lambda config: config.pop("input_shapes"),
        lambda config: config.update(architecture="resnet50"),
        lambda config: config.update(quantization_config=[]),
    ],
)
def test_an_edit_of_config_json_is_refused_since_it_would_change_nothing(saved, change):
    edit(saved, change)
    refused(saved, r"config\.json beside it was edited \(\w+\); it only repeats")


def test_what_others_add_to_config_json_is_no_obstacle(saved):
    edit(saved, lambda config: config.update(_name_or_path="user/repo"))
    assert load(saved)


def test_a_config_json_of_another_model_is_said_and_not_read(roads, images, saved, tmp_path, caplog):
    """Makes the folder that a process leaves if it is killed between the two files."""
    other = save(convert(roads.calibrated(W8A8)), tmp_path / "other")
    (saved / "config.json").write_bytes((other / "config.json").read_bytes())
    assert torch.equal(load(saved)(images), convert(roads.calibrated(W4A4))(images))
    assert "describes another model than model.safetensors beside it" in caplog.text


def test_a_folder_of_something_else_is_an_error(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(tmp_path, r"it has no config\.json")
    assert not module.is_saved(tmp_path)
