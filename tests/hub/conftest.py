import pytest
import torch
from helpers.loopback_hub import Hub, hub, point_to
from torch import nn
from torch.fx import GraphModule

import ptq4vm
import ptq4vm.models


@pytest.fixture
def server(tmp_path, monkeypatch) -> Hub:
    """A Hub that this process talks to, logged in."""
    with hub() as running:
        point_to(running, tmp_path / "home", monkeypatch)
        yield running


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def vim(pictures) -> GraphModule:
    """A quantized model that timm knows."""
    torch.manual_seed(0)
    model = ptq4vm.models.create_model("vim_nano_patch4_32", depth=1, num_classes=7).eval()
    return ptq4vm.quantize(model, [pictures], ptq4vm.QuantConfig.minmax(4), progress=False)


@pytest.fixture(scope="session")
def plain() -> GraphModule:
    """A quantized model that timm does not know, of which little is known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    return ptq4vm.quantize(model, [torch.randn(4, 5, 8)], ptq4vm.QuantConfig(gptq=True), progress=False)
