"""Selects linears but those of stem and head, in blocks or not, and convolutions that have a weight to quantize."""

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import BEST, LEARNED, Block
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, ops, prepare
from ptq4vm.graph.capture import capture
from ptq4vm.graph.sites import ConvolutionSite, LinearSite, sites_of
from ptq4vm.metadata import metadata_of
from ptq4vm.passes.prepare.pipeline import prepared_graph
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


class Stage(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.reduction = nn.Linear(2 * width, 2 * width)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.reduction(x.unflatten(1, (-1, 2)).flatten(2))


class Levels(nn.Module):
    """Two linears before the blocks, a reduction and a bottleneck behind them, and a head on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList([Stage(8)])
        self.bottleneck, self.head = Block(16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.layers[0](self.second(torch.relu(self.embed(x))))
        return self.head(self.bottleneck(x))


class Writing(Levels):
    """Its last linear writes the residual stream."""

    def forward(self, x):
        x = self.layers[0](self.second(torch.relu(self.embed(x))))
        return x[..., :3] + self.head(x)


class Scanned(Levels):
    """A scan follows its last linear."""

    def forward(self, x):
        y = self.head(self.layers[0](self.second(torch.relu(self.embed(x))))).transpose(1, 2)
        return ops.selective_scan(y, y, -torch.ones(3, 2), y[:, :2], y[:, :2], None, None, None, True)


INSIDE = [f"layers.0.blocks.{i}.{name}" for i in (0, 1) for name in ("fc1", "fc2")]
LAST = ["bottleneck.fc1", "bottleneck.fc2"]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Levels, ["second", *INSIDE, "layers.0.reduction", *LAST]),
        (Writing, ["second", *INSIDE, "layers.0.reduction", "head"]),
        (Scanned, ["second", *INSIDE, "layers.0.reduction", "head"]),
    ],
)
def test_all_linears_but_stem_and_head_are_selected(kind, wanted):
    prepared = prepare(kind().eval(), (torch.randn(2, 4, 6),), QuantConfig.minmax(8))
    assert [linear.name for linear in metadata_of(prepared).linears] == wanted
    assert [p.left for p in metadata_of(prepared).coverage.products if p.name == "embed"] == ["stem"]


def test_a_saved_model_may_have_fewer():
    prepared = prepared_graph(Levels().eval(), (torch.randn(2, 4, 6),), QuantConfig.minmax(8), frozenset(INSIDE))
    assert [linear.name for linear in metadata_of(prepared).linears] == INSIDE


@pytest.mark.parametrize("config", [LEARNED, BEST], ids=["ptq4vm", "best"])
def test_linears_before_and_behind_the_blocks_are_calibrated_and_learned(config, tmp_path):
    torch.manual_seed(0)
    model, x = Levels().eval(), torch.randn(8, 4, 6)
    prepared = [prepare(model, (x[:2],), config) for _ in range(2)]
    for graph in prepared:  # the second one reads what the first has finished
        calibrate(graph, [x], progress=False, resume_dir=tmp_path)
    reports = metadata_of(prepared[0]).blocks
    assert [(report["block"], report["linears"]) for report in reports] == [
        ("stem", ["second"]),
        ("layers.0.blocks.0", INSIDE[:2]),
        ("layers.0.blocks.1", INSIDE[2:]),
        ("head", ["layers.0.reduction", *LAST]),
    ]
    assert all(0 < report["loss_after"] <= report["loss_before"] for report in reports)
    first, second = (graph.state_dict() for graph in prepared)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(convert(prepared[0], lower=False)(x), prepared[0](x))


class Mixer(nn.Module):
    """Its products stand in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.x_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(F.silu(F.linear(x, self.x_proj.weight)), self.out_proj.weight)


class Mixers(nn.Module):
    """Mixers, and MLPs whose linears have numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList([Mixer(), Mixer()])
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, x):
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = x + mlp(mixer(x))
        return x


def test_a_numbered_module_is_a_block_even_where_it_multiplies_itself():
    prepared = prepare(Mixers().eval(), (torch.randn(2, 5, 8),), QuantConfig.minmax(8))
    reports = metadata_of(calibrate(prepared, [torch.randn(2, 5, 8)], progress=False)).blocks
    assert [(report["block"], report["linears"]) for report in reports] == [
        (f"{kind}.{i}", [f"{kind}.{i}.{name}" for name in names])
        for i in (0, 1)
        for kind, names in (("mixers", ("x_proj", "out_proj")), ("mlps", ("0", "2")))
    ]


def test_a_numbered_layer_is_no_block():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(5, 10, 1), nn.Linear(8, 8)).eval()
    prepared = prepare(model, (torch.randn(2, 5, 8),), QuantConfig.minmax(8))
    assert {site.block for site in sites_of(prepared, LinearSite).values()} == {None}
