import copy
import os
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.strategies import normal
from hypothesis import settings
from torch import Tensor
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig

# torchao and timm, which the rest of the package needs, are imported where they are used: tests/gpu runs without them
if TYPE_CHECKING:
    from ptq4vm.models import Vim

settings.register_profile("short", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("thorough", settings.get_profile("short"), max_examples=50)  # of `make test-all`
settings.load_profile("short")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def small_vim() -> "Vim":
    """17 tokens, two blocks of six linears. Tokens differ in size and a few channels are outliers. Do not change it."""
    from ptq4vm.models import Vim

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


class Roads:
    """`small_vim` prepared and calibrated, made once for each config and copied for each caller."""

    def __init__(self, model: "Vim", images: Tensor) -> None:
        self.model, self.images = model, images
        self._made: dict[tuple[QuantConfig, bool], GraphModule] = {}

    def prepared(self, config: QuantConfig) -> GraphModule:
        return self._copy(config, False)

    def calibrated(self, config: QuantConfig) -> GraphModule:
        return self._copy(config, True)

    def _copy(self, config: QuantConfig, calibrated: bool) -> GraphModule:
        from ptq4vm.api import calibrate, prepare

        key = config, calibrated
        if key not in self._made:
            if calibrated:
                made = calibrate(self.prepared(config), self.images.split(5), progress=False)
            else:
                made = prepare(self.model, (self.images[:2],), config)
            self._made[key] = made
        with warnings.catch_warnings():
            # torch 2.11 warns about its own classes when a graph is copied
            warnings.simplefilter("ignore", FutureWarning)
            return copy.deepcopy(self._made[key])


@pytest.fixture(scope="session")
def roads(small_vim: "Vim", images: Tensor) -> Roads:
    return Roads(small_vim, images)
