"""`--import`: models of the user's own Python, which may ask for CUDA extensions that are not there."""

import json
import sys

import pytest
import timm
from helpers.fake_packages import packages

OWN_MODEL = """
    import torch
    from mamba_ssm import Mamba
    from timm.models import register_model
    from beside import CHANNELS

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_classes = 10
            self.default_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
            self.patch_embed = torch.nn.Conv2d(3, CHANNELS, 4, 4)
            self.layers = torch.nn.ModuleList([Mamba(CHANNELS, d_state=4)])
            self.head = torch.nn.Linear(CHANNELS, 10)

        def forward(self, x):
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            for layer in self.layers:
                import selective_scan_cuda
                x = x + layer(x)
            return self.head(x.mean(1))

    @register_model
    def model_of_my_own(pretrained=False, **options):
        return Mixed()
"""


@pytest.fixture
def own_file(tmp_path):
    """A file beside another one that it imports, as scripts do."""
    folder = tmp_path / "clone"
    with packages(folder, {"own_model.py": OWN_MODEL, "beside.py": "CHANNELS = 8"}):
        sys.path.remove(str(folder))
        yield folder / "own_model.py"
        sys.path.insert(0, str(folder))
    timm.models._registry._model_entrypoints.pop("model_of_my_own", None)


def test_a_models_file_is_named_and_quantized(run, tmp_path, own_file, photos, config):
    command = ("--import", own_file, "quantize", "model_of_my_own", "--checkpoint", "random", "--data-dir", photos)
    options = ("--output", tmp_path / "quantized", "--config", config, "--images", 4, "--batch-size", 2, "--json")
    code, out, err = run(*command, *options)
    assert code == 0, err
    assert json.loads(out)["linears"] == 4
    assert "mamba_ssm" not in sys.modules
    code, out, err = run("evaluate", tmp_path / "quantized", "--data-dir", photos, "--split", "val", "--limit", 2)
    assert code == 0, err


def test_a_module_of_the_working_folder(run, own_file, photos, monkeypatch, tmp_path):
    monkeypatch.chdir(own_file.parent)
    options = ("--checkpoint", "random", "--data-dir", photos, "--split", "val", "--images", 2)
    code, _, err = run("--import", "own_model", "inspect", "model_of_my_own", *options)
    assert code == 0, err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--import {file}: there is no such file"),
        ("import a_package_of_nobody", "--import {file}: ModuleNotFoundError: No module named 'a_package_of_nobody'"),
        ("1 / 0", "--import {file}: ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_line(run, tmp_path, text, message):
    file = tmp_path / "broken_model.py"
    if text is not None:
        file.write_text(text)
    code, out, err = run("--import", file, "inspect", "vim_nano_patch4_32", "--checkpoint", "random")
    assert (code, out, err) == (1, "", f"ptq4vm: error: {message.format(file=file)}\n")
    assert "broken_model" not in sys.modules


def test_weights_are_asked_for_where_a_registered_model_has_none(run, own_file, photos):
    code, _, err = run("--import", own_file, "inspect", "model_of_my_own", "--data-dir", photos)
    assert code == 1 and "timm has no weights for model_of_my_own: give --checkpoint FILE" in err
