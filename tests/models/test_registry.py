"""Names of our models that another package registers with timm too, in both orders of import."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import timm

from ptq4vm.models.registry import ENTRIES, create_model, is_model, pretrained_cfg

THEIRS = """
from timm.models import register_model
from torch import nn

default_cfgs = {"vmamba_nano_32": {"url": "", "crop_pct": 0.5, "mean": (0.0, 0.0, 0.0)}}

class Theirs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

def _make(name):
    def create(pretrained=False, **options):
        return Theirs()
    create.__name__ = name
    create.__module__ = __name__
    globals()[name] = register_model(create)

for name in ("local_vim_tiny", "vmamba_nano_32", "mamba_vision_T"):
    _make(name)
"""
"""A package that registers names as the authors' repositories do."""

LOOK = """
import timm
for name in ("local_vim_tiny", "vmamba_nano_32", "mamba_vision_T"):
    assert type(timm.create_model(name)).__name__ == "Theirs", name
assert timm.get_pretrained_cfg("vmamba_nano_32").crop_pct == 0.5

from ptq4vm.models import create_model
from ptq4vm.models.identify import identify, registered
from ptq4vm.serialization.version_1 import build_model
from ptq4vm.cli.sources import named_model

families = {"local_vim_tiny": "LocalVim", "mamba_vision_T": "MambaVision", "vmamba_nano_32": "VMamba"}
for name, family in families.items():
    model = create_model(name)
    assert type(model).__name__ == family and model.pretrained_cfg["architecture"] == name
    assert type(named_model(name, "random", False)).__name__ == family
    assert type(build_model({"name": name, "arguments": {}}, "folder")).__name__ == family
    assert str(identify(model.state_dict())[0]) == name
    assert name in registered()
model = named_model("vmamba_nano_32", None, False)
assert model.pretrained_cfg["crop_pct"] == 1.0 and model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
assert create_model("vmamba_nano_32.digits", pretrained=True).classifier.head.bias.std() > 0
"""


@pytest.mark.parametrize("order", ["theirs ours", pytest.param("ours theirs", marks=pytest.mark.slow)])
def test_a_package_with_the_same_names_keeps_them_in_timm_and_we_keep_ours(tmp_path, order):
    """timm warns of the names only where theirs take the place of ours, and names their module."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    imports = "\n".join(f"import {'ptq4vm.models' if who == 'ours' else who}" for who in order.split())
    script = textwrap.dedent(imports) + LOOK
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "Overwriting" in line]
    assert len(warned) == (0 if order == "theirs ours" else 3)
    assert all(" registry with theirs." in line for line in warned)


def test_without_such_a_package_timm_makes_the_same_models():
    for name in ("vim_nano_patch4_32.digits_hard", "vmamba_nano_32", "mamba_vision_S"):
        one, two = create_model(name), timm.create_model(name)
        assert type(one) is type(two) and one.pretrained_cfg == two.pretrained_cfg
        assert timm.get_pretrained_cfg(name) == pretrained_cfg(name)


def test_every_model_of_ours_is_in_timm():
    assert set(ENTRIES) <= set(timm.list_models()) and all(map(is_model, ENTRIES))


def test_models_of_timm_are_made_by_timm():
    model = create_model("resnet18", num_classes=3)
    assert type(model).__name__ == "ResNet" and model.num_classes == 3
    assert pretrained_cfg("resnet18.a1_in1k") == timm.get_pretrained_cfg("resnet18.a1_in1k")
    assert is_model("resnet18.a1_in1k") and not is_model("no_such_model")
    with pytest.raises(RuntimeError, match="Unknown model"):
        create_model("no_such_model")


@pytest.mark.parametrize("create", [create_model, timm.create_model])
def test_a_tag_that_a_model_does_not_have_is_refused(create):
    with pytest.raises(RuntimeError, match=r"tag \(other\) for vim_nano_patch4_32.*digits, digits_hard"):
        create("vim_nano_patch4_32.other")
    with pytest.raises(RuntimeError, match=r"tag \(other\).*none"):
        create("vmamba_tiny_s1l8.other")


def test_options_of_timm_are_taken():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model("vim_nano_patch4_32", img_size=None, depth=1, pretrained_cfg_overlay={"crop_pct": 0.7})
    assert model.pretrained_cfg["crop_pct"] == 0.7 and model.model_args == {"depth": 1} and len(model.layers) == 1
