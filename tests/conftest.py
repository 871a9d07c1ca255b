import os

import pytest
import torch
from hypothesis import settings
from strategies import normal
from torch import Tensor

from ptq4vm.models import Vim

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def small_vim() -> Vim:
    """17 tokens, two blocks of six linears. Tokens differ in size and a few channels are outliers. Do not change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Vim(img_size=16, patch_size=4, embed_dim=32, depth=2, state=4, num_classes=10)
    with torch.no_grad():
        tokens = 17
        model.cls_token.copy_(normal(1, 1, 32, seed=1))
        model.pos_embed.copy_(normal(1, tokens, 32, seed=2) * torch.linspace(0.2, 3, tokens).view(-1, 1))
        for block in model.layers:
            block.norm.weight[::8] = 6
            for conv in (block.mixer.conv1d, block.mixer.conv1d_b):
                conv.weight *= 2
            for projection in (block.mixer.x_proj, block.mixer.x_proj_b, block.mixer.out_proj):
                projection.weight *= 4
        model.head.weight.copy_(normal(10, 32, seed=3) / 4)
    return model.eval()


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Twelve for `small_vim`."""
    return normal(12, 3, 16, 16, seed=4)
