"""Folders of format version 2, whose records hold the flat keys of configs, still load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptq4vm import QuantConfig, load, save
from ptq4vm.metadata import metadata_of
from ptq4vm.saving import CheckpointError

SAVED = Path(__file__).parents[1] / "golden" / "format_version_2"
"""A Vim of one block at W4A6 with a quantized state, saved by ptq4vm 0.1.0 at commit a2b6a1a, with images and the
logits it had there."""


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SAVED, tmp_path / "model"))


@pytest.fixture(scope="module")
def expected():
    return load_file(SAVED / "expected.safetensors")


def test_an_old_folder_loads(folder, expected):
    torch.testing.assert_close(load(folder)(expected["images"]), expected["logits"], rtol=1e-5, atol=1e-6)


def test_its_config_is_the_one_it_was_made_with(folder):
    learning = {"epochs": 1, "batch_size": 4}
    changes = {"activations": {"bits": 6}, "seed": 3, "exclude": ("*.dt_proj_b",), "learning": learning}
    assert metadata_of(load(folder)).config == QuantConfig.recipe("ptq4vm+state", 4, **changes)


def test_an_old_folder_is_saved_anew_in_the_new_format(folder, expected):
    old = load(folder)
    save(old, folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == 3
    assert torch.equal(load(folder)(expected["images"]), old(expected["images"]))
    assert metadata_of(load(folder)) == metadata_of(old)


def test_an_edit_is_still_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"weight_bits": 4', '"weight_bits": 8'))
    with pytest.raises(CheckpointError, match="was edited"):
        load(folder)
