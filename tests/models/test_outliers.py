import pytest
import timm
import torch
from helpers.strategies import normal
from torch import nn

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from ptq4vm import prepare
from ptq4vm.inspection.phenomena import observe
from ptq4vm.models.outliers import CHANNEL_FACTORS, DT_FACTOR, inject_outliers

NAMES = ["vim_nano_patch4_32", "local_vim_nano_patch4_32", "vmamba_nano_32", "local_vmamba_nano_32"]
IMAGES = normal(4, 3, 32, 32)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    original, changed = (timm.create_model(name, pretrained=True).eval() for _ in range(2))
    inject_outliers(changed)
    return original, changed


@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays_bit_for_bit(name):
    original, changed = pair(name)
    with torch.inference_mode():
        assert torch.equal(original(IMAGES), changed(IMAGES))
    same = [key for key, value in changed.state_dict().items() if torch.equal(value, original.state_dict()[key])]
    assert 0 < len(same) < len(original.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_channels_grow_in_front_of_the_linears(name):
    """Channels grow in every kind of linear that reads a norm or dt, and by the factors at most."""
    before, after = (observe(prepare(model, (IMAGES,)), [IMAGES]) for model in pair(name))
    grown = {linear for linear in after if after[linear].channel_outliers > 2 * before[linear].channel_outliers}
    kinds = {"in_proj", "dt_proj"} if "vim" in name else {"in_proj", "dt_projs_weight", "out_proj"}
    kinds |= {"fc1"} if name == "vmamba_nano_32" else set()
    assert all(any(f".{kind}" in linear for linear in grown) for kind in kinds)
    for linear in grown:
        assert after[linear].channel_outliers <= max(*CHANNEL_FACTORS, DT_FACTOR) * before[linear].channel_outliers
