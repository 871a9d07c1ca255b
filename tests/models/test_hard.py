import pytest
import timm
import torch
from strategies import normal
from torch import nn

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from ptq4vm import prepare
from ptq4vm.models.hard import CHANNEL_FACTORS, STEP_FACTOR, harden
from ptq4vm.observers import observe

NAMES = ["vim_nano_patch4_32", "local_vim_nano_patch4_32", "vmamba_nano_32", "local_vmamba_nano_32"]
IMAGES = normal(4, 3, 32, 32)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    plain, hard = (timm.create_model(name, pretrained=True).eval() for _ in range(2))
    harden(hard)
    return plain, hard


@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays_bit_for_bit(name):
    plain, hard = pair(name)
    with torch.inference_mode():
        assert torch.equal(plain(IMAGES), hard(IMAGES))
    same = [key for key, value in hard.state_dict().items() if torch.equal(value, plain.state_dict()[key])]
    assert 0 < len(same) < len(plain.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_channels_grow_in_front_of_the_linears(name):
    """A channel that the factor makes large is at least as far above the median as the factor is above what it was."""
    before, after = (observe(prepare(model, (IMAGES,)), [IMAGES]) for model in pair(name))
    grown = {linear for linear in after if after[linear].channel_outliers > 2 * before[linear].channel_outliers}
    assert grown
    for linear in grown:
        assert after[linear].channel_outliers <= max(*CHANNEL_FACTORS, STEP_FACTOR) * before[linear].channel_outliers
