"""Selects convolutions that have a weight to quantize."""

import torch
from torch import nn

from ptq4vm import QuantConfig
from ptq4vm.graph.capture import capture
from ptq4vm.graph.sites import ConvolutionSite, sites_of
from ptq4vm.passes.prepare.select import SelectSites


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.biased, self.bare = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, bias=False)

    def forward(self, x):
        y = self.bare(self.biased(x))
        computed = y.mean((2, 3), keepdim=True).mean(0).expand(2, 2, 1, 1)
        return self.head(nn.functional.conv2d(y, computed, self.biased.bias).flatten(1, 2))


def test_those_with_a_parameter_with_a_bias_or_without():
    gm = capture(Convolutions(), (torch.randn(2, 2, 3, 3),))
    found = sites_of(SelectSites(QuantConfig.kscaled(state=None, learning=None))(gm), ConvolutionSite)
    assert [site.name for site in found.values()] == ["biased.conv2d", "bare.conv2d"]
    assert [node.args[1].target for node in found] == ["biased.weight", "bare.weight"]
