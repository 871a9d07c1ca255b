"""Folders of format version 1 still load, the old way; a stranger's config.json builds nothing that it should not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ptq4vm import load, save
from ptq4vm.saving import CheckpointError, is_saved

SAVED = Path(__file__).parents[1] / "golden" / "format_version_1"
"""Vim of one block at W4A4, saved by ptq4vm 0.1.0 at commit 39c74e5, with images and its logits."""


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SAVED, tmp_path / "model"))


@pytest.fixture(scope="module")
def expected():
    return load_file(SAVED / "expected.safetensors")


def make() -> torch.nn.Module:
    return timm.create_model("vim_nano_patch4_32", depth=1, embed_dim=16, num_classes=7)


@pytest.mark.parametrize("given", [False, True])
def test_an_old_folder_loads(folder, expected, given):
    loaded = load(folder, model=make() if given else None)
    torch.testing.assert_close(loaded(expected["images"]), expected["logits"], rtol=1e-5, atol=1e-6)


def test_an_old_folder_is_saved_anew_in_the_new_format(folder, expected):
    assert is_saved(folder)
    old = load(folder)
    save(old, folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == 3
    assert torch.equal(load(folder)(expected["images"]), old(expected["images"]))


def test_a_process_that_is_killed_while_it_replaces_an_old_folder_leaves_a_model(folder, expected, monkeypatch):
    old, replace = load(folder), os.replace

    def fail(source, target):
        if str(target).endswith("config.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("ptq4vm.files.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save(old, folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == 1
    assert torch.equal(load(folder)(expected["images"]), old(expected["images"]))


def edit(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def refused(folder, message: str, model=None) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder, model=model)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["quantization_config"].update(weight_bits=9), "corrupt"),
        (lambda config: config["quantization_config"].update(weight_bit=4), "has no key 'weight_bit'"),
        (lambda config: config["quantization_config"].pop("linears"), "corrupt"),
        (lambda config: config["quantization_config"]["linears"][0].pop("tokens"), "corrupt"),
        (lambda config: config.pop("input_shapes"), "corrupt"),
        (lambda config: config.pop("architecture"), "corrupt"),
        (lambda config: config.update(quantization_config=[]), "corrupt or not a quantized model's"),
        (lambda config: config["quantization_config"].update(quant_method="gptq"), "was quantized by 'gptq'"),
        (lambda config: config["quantization_config"].update(format_version=99), "has format version 99"),
        (lambda config: config["quantization_config"].update(weight_bits=8), "tensors do not fit Vim"),
        (lambda config: config.update(input_shapes=[[3, 16, 16]]), "does not fit Vim|tensors do not fit"),
        (lambda config: config.update(weights_sha256="0"), "SHA-256 differs"),
    ],
)
def test_an_edited_config_is_an_error(folder, change, message):
    edit(folder, change)
    refused(folder, message)


@pytest.mark.parametrize(
    "name",
    ["vim_colossal", "hf-hub:user/repo", "local-dir:/tmp/model", "/etc/passwd", "vim_nano_patch4_32:x", "a/b", 3, ""],
)
def test_only_names_of_the_registry_are_built(folder, monkeypatch, name):
    def refuse(*args, **options):
        raise AssertionError("built")

    monkeypatch.setattr(timm, "create_model", refuse)
    edit(folder, lambda config: config.update(architecture=name))
    refused(folder, r"timm cannot build the model.*load\(folder, model=your_model\)")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("pretrained", True),
        ("pretrained_cfg", {"url": "http://localhost/evil.pth"}),
        ("pretrained_cfg_overlay", {"file": "evil.pth"}),
        ("checkpoint_path", "evil.pth"),
        ("cache_dir", "evil"),
        ("scriptable", True),
        ("depth", 10**9),
        ("embed_dim", 2**40),
        ("num_classes", float("inf")),
        ("img_size", [[224] * 3] * 100),
        ("act_layer", "os.system('true')"),
    ],
)
def test_only_plain_arguments_are_given_to_timm(folder, monkeypatch, argument, value):
    def refuse(*args, **options):
        raise AssertionError("built")

    monkeypatch.setattr(timm, "create_model", refuse)
    edit(folder, lambda config: config["model_args"].update({argument: value}))
    refused(folder, f"the argument {argument}=.* is refused")


def test_no_giant_is_built(folder):
    edit(folder, lambda config: config["model_args"].update(embed_dim=8192))
    refused(folder, "would have [0-9]+ parameters, the file [0-9]+: it is refused")


def test_one_flipped_bit_is_an_error(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(folder, "SHA-256 differs.*truncated or edited")


@pytest.mark.parametrize(
    ("ending", "spoil", "message"),
    [
        ("input_scale", lambda value: value * float("nan"), "scales are finite and positive"),
        ("weight_scale", lambda value: -value, "scales are finite and positive"),
        ("zero_point", lambda value: value + 1000, "zero points lie between"),
        ("weight_scale", lambda value: value.double(), "tensors do not fit"),
    ],
)
def test_numbers_that_no_calibration_finds_are_refused(folder, ending, spoil, message):
    import hashlib

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name] = spoil(tensors[name])
    save_file(tensors, path)
    edit(folder, lambda config: config.update(weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    refused(folder, message)


def test_a_model_of_another_shape_is_an_error_that_names_tensors(folder):
    other = timm.create_model("vim_nano_patch4_32", depth=2, embed_dim=16, num_classes=7)
    refused(folder, r"tensors do not fit Vim, first .*layers\.1\.", other)


def test_a_model_that_timm_cannot_build_must_be_given(folder, expected):
    edit(folder, lambda config: config.update(architecture=None))
    refused(folder, r"made from a model that timm cannot build; load\(folder, model=your_model\)")
    assert load(folder, model=make())(expected["images"]).shape == (2, 7)
