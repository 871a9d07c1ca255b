"""Which convolutions have a weight to quantize."""

import torch
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.passes.prepare.decompose import convolution_weights


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.biased, self.bare = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, bias=False)

    def forward(self, x):
        y = self.bare(self.biased(x))
        computed = y.mean((2, 3), keepdim=True).mean(0).expand(2, 2, 1, 1)
        return nn.functional.conv2d(y, computed, self.biased.bias)


def test_those_with_a_parameter_with_a_bias_or_without():
    gm = capture(Convolutions(), (torch.randn(2, 2, 3, 3),))
    found = convolution_weights(gm)
    assert list(found) == ["biased.conv2d", "bare.conv2d"]
    assert [node.args[1].target for node in found.values()] == ["biased.weight", "bare.weight"]
