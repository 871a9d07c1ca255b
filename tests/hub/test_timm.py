"""`timm.create_model` of a repository that was pushed: the quantized model, or one sentence, never the float one."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import model_entrypoint

import ptq4vm
from ptq4vm.saving import TIMM_NAME


def test_the_name_before_the_dot_is_the_one_that_is_registered():
    assert timm.is_model(TIMM_NAME) and model_entrypoint(TIMM_NAME).__module__ == "ptq4vm.models.quantized"


@pytest.mark.parametrize("pretrained", [True, False])
def test_timm_returns_the_quantized_model_with_its_preprocessing(server, vim, pictures, pretrained):
    ptq4vm.push_to_hub(vim, "org/vim")
    ptq4vm.push_to_hub(vim, "org/vim", revision="v1")
    for name in ("hf-hub:org/vim", "hf-hub:org/vim@v1"):
        model = timm.create_model(name, pretrained=pretrained)
        assert torch.equal(model(pictures), vim(pictures))
    assert model.num_classes == 7 and resolve_model_data_config(model)["mean"] == [0.5, 0.5, 0.5]
    assert resolve_model_data_config(model)["input_size"] == [3, 32, 32]


def test_a_model_that_timm_does_not_know_comes_too(server, plain):
    ptq4vm.push_to_hub(plain, "org/plain")
    x = torch.randn(3, 5, 8)
    assert torch.equal(timm.create_model("hf-hub:org/plain")(x), plain(x))


def test_a_copy_of_the_repository_in_a_folder(server, vim, pictures, tmp_path):
    ptq4vm.push_to_hub(vim, "org/vim")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(server.repos["org/vim"].files()[name])
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}")(pictures), vim(pictures))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 3}, "hf-hub:org/vim is quantized and cannot be changed by num_classes: leave that out"),
        ({"depth": 1, "in_chans": 1}, "cannot be changed by depth, in_chans"),
        ({"cache_dir": "elsewhere"}, "leave cache_dir out, or set HF_HOME"),
    ],
)
def test_what_would_make_another_model_is_refused(server, vim, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    ptq4vm.push_to_hub(vim, "org/vim")
    with pytest.raises(ValueError, match=message):
        timm.create_model("hf-hub:org/vim", **options)


def test_the_name_alone_is_no_model():
    with pytest.raises(ValueError, match="quantized models have no architecture of their own"):
        timm.create_model("quantized_by_ptq4vm")


def test_without_our_models_timm_says_what_to_import(server, vim, tmp_path):
    ptq4vm.push_to_hub(vim, "org/vim")
    code = "import timm\ntry: timm.create_model('hf-hub:org/vim', pretrained=True)\nexcept RuntimeError as e: print(e)"
    variables = os.environ | server.environment(tmp_path / "fresh")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120)
    assert done.stdout == f"Unknown model ({TIMM_NAME})\n", done.stderr
    assert "Run 'import ptq4vm.models' before timm.create_model, or use ptq4vm.load" in done.stdout
