"""x (B, L, D), W (N, D)."""

import pytest
import torch
from helpers.graphs import canonical, passed, with_sites
from helpers.strategies import normal
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, ops, prepare
from ptq4vm.graph.sites import LinearSite, sites_of
from ptq4vm.passes.prepare.rotate import insert_rotation
from ptq4vm.passes.quantized_nodes import quantized_linears
from ptq4vm.quantizers import Mode, constant


class Mlp(nn.Module):
    """The value written to the stream is arranged and scaled before it is added."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, width), nn.Linear(8, width), nn.Linear(width, 8)
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        y = nn.functional.dropout(self.down(self.up(x) * self.gate(x)), 0.1, self.training)
        return x + self.scale * y.transpose(1, 2).transpose(1, 2)


class Cubes(nn.Module):
    """Normal numbers: most are small, and some in every token are large."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.down(x.pow(3))


class Added(nn.Module):
    """Its linear's output meets a parameter and itself, no other stream."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.positions = nn.Linear(8, 8), nn.Parameter(torch.rand(4, 8))

    def forward(self, x):
        return (self.linear(x) + self.positions).relu()


def rotated_names(model: nn.Module, x: torch.Tensor) -> set[str]:
    """Names of the linears whose weight the pass has rotated."""
    gm = with_sites(canonical(model, x))
    before = {node: node.args[1] for node in sites_of(gm, LinearSite)}
    sites = sites_of(insert_rotation(gm), LinearSite)
    changed = {site.name for node, site in sites.items() if node.args[1] is not before[node]}
    assert changed == {site.name for site in sites.values() if site.rotated}
    return changed


@pytest.mark.parametrize("width", [1, 16, 24, 34, 80])
def test_the_function_stays(width):
    torch.manual_seed(0)
    model, x = Mlp(width).eval(), normal(3, 5, 8)
    gm = passed(insert_rotation, model, x)
    assert torch.allclose(gm(x), model(x), atol=1e-5)


def test_every_channel_meets_every_other():
    """One large channel of W comes to all of W R, and to each by a like amount."""
    gm = passed(insert_rotation, Mlp(80), normal(2, 5, 8))
    down = next(node for node, site in sites_of(gm, LinearSite).items() if site.name == "down")
    with torch.no_grad():
        gm.get_parameter("down.weight").copy_(torch.eye(8, 80))
        rows = constant(gm, down.args[1])
    assert rows.ne(0).all() and rows.abs().max() < 2 / 80**0.5


def test_what_writes_to_the_stream_is_rotated_and_nothing_else(small_vim, images):
    assert rotated_names(small_vim, images) == {f"layers.{i}.mixer.out_proj" for i in range(2)}
    assert rotated_names(Mlp().eval(), normal(3, 5, 8)) == {"down"}
    assert rotated_names(Added().eval(), normal(3, 4, 8)) == set()


def test_smoothing_before_the_rotation_keeps_the_function():
    torch.manual_seed(0)
    model, x = Mlp(80).eval(), normal(3, 5, 8)
    prepared = prepare(model, (x,), QuantConfig(rotation=True))
    linears = quantized_linears(prepared)
    assert [linear.site.rotated for linear in linears] == [False, False, True]

    def seen() -> torch.Tensor:
        linears[-1].input.forget()
        linears[-1].input.mode = Mode.OBSERVE
        assert torch.allclose(prepared(x), model(x), atol=1e-5)
        return linears[-1].input.observations[0]

    before = seen()
    for linear in linears:
        linear.smooth.data = normal(len(linear.smooth)) / 2
    assert not torch.allclose(seen(), before, atol=0.1)
    assert torch.allclose(seen(), linears[-1].smoothed(before), atol=1e-5)


class Hidden(nn.Module):
    """A channel of what writes to the stream times a factor, which its weight takes back."""

    def __init__(self, factors: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factors, self.down = factors, nn.Linear(64, 64)
        self.down.weight.data /= factors

    def forward(self, x):
        return x + self.down(x * self.factors)


def error(model: nn.Module, x: torch.Tensor, **changes) -> float:
    config = QuantConfig(weights={"bits": 4}, activations={"bits": 4}, **changes)
    with torch.no_grad():
        quantized = convert(calibrate(prepare(model.eval(), (x,), config), [x], progress=False))
        return (quantized(x) - model(x)).square().mean().item()


def test_channels_that_are_large_in_every_image_cost_a_rotation_nothing():
    x, ones, factors = normal(64, 5, 64), torch.ones(64), torch.ones(64)
    factors[::16] = 64
    plain, hard = (error(Hidden(each), x, rotation=True) for each in (ones, factors))
    assert hard == pytest.approx(plain, rel=0.02)
    assert error(Hidden(factors), x, rotation=True, smoothing=None) > 4 * plain


def test_a_long_tail_costs_far_less():
    torch.manual_seed(0)
    model, x = Cubes(), normal(64, 5, 64)
    assert error(model, x, rotation=True) < error(model, x) / 2


def test_linears_left_in_floating_point_stay_as_they_are(small_vim, images):
    config = QuantConfig(rotation=True, exclude=("*.out_proj",))
    assert not prepare(small_vim, (images,), config).graph.find_nodes(op="call_function", target=ops.rotate.default)
