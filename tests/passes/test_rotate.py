"""x (B, L, D), W (N, D)."""

import pytest
import torch
from strategies import normal
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, ops, prepare
from ptq4vm.fake_quantize import constant
from ptq4vm.graph import Pipeline, capture, find_linears, finish
from ptq4vm.passes.canonicalize import CANONICALIZE
from ptq4vm.passes.rotate import insert_rotation


class Mlp(nn.Module):
    """What is written to the stream is arranged and scaled before it is added."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, width), nn.Linear(8, width), nn.Linear(width, 8)
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        y = nn.functional.dropout(self.down(self.up(x) * self.gate(x)), 0.1, self.training)
        return x + self.scale * y.transpose(1, 2).transpose(1, 2)


class Cubes(nn.Module):
    """Of normal numbers: most are small, and some in every token are large."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.down(x.pow(3))


class Normed(nn.Module):
    """A norm, gated or not, before what writes to the stream; with `shared`, the gate reads the norm too."""

    def __init__(self, norm: nn.Module, gated: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.norm, self.gate, self.down = norm, nn.Linear(8, 8), nn.Linear(8, 8)
        self.gated, self.shared = gated, shared

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(y * self.gate(y if self.shared else x) if self.gated else y)


class Added(nn.Module):
    """Its linear's output meets a parameter and itself, no other stream."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.positions = nn.Linear(8, 8), nn.Parameter(torch.rand(4, 8))

    def forward(self, x):
        return (self.linear(x) + self.positions).relu()


def canonical(model: nn.Module, x: torch.Tensor):
    return Pipeline(CANONICALIZE)(capture(model, (x,)))


def rotated_names(model: nn.Module, x: torch.Tensor) -> set[str]:
    """Of the linears whose weight the pass has rotated."""
    gm = canonical(model, x)
    sites = find_linears(gm)
    before = {site.name: site.node.args[1] for site in sites}
    insert_rotation(gm, sites)
    return {site.name for site in sites if site.node.args[1] is not before[site.name]}


@pytest.mark.parametrize("width", [1, 16, 24, 34, 80])
def test_the_function_stays(width):
    torch.manual_seed(0)
    model, x = Mlp(width).eval(), normal(3, 5, 8)
    gm = canonical(model, x)
    gm = finish(insert_rotation(gm, find_linears(gm)))
    assert torch.allclose(gm(x), model(x), atol=1e-5)


def test_every_channel_meets_every_other():
    """One large channel of W comes to all of W R, and to each by a like amount."""
    gm = canonical(Mlp(80), normal(2, 5, 8))
    down = next(site.node for site in find_linears(gm) if site.name == "down")
    gm = finish(insert_rotation(gm, find_linears(gm)))
    with torch.no_grad():
        gm.get_parameter("down.weight").copy_(torch.eye(8, 80))
        rows = constant(gm, down.args[1])
    assert rows.ne(0).all() and rows.abs().max() < 2 / 80**0.5


def test_what_writes_to_the_stream_is_rotated_and_nothing_else(small_vim, images):
    assert rotated_names(small_vim, images) == {f"layers.{i}.mixer.out_proj" for i in range(2)}
    assert rotated_names(Mlp().eval(), normal(3, 5, 8)) == {"down"}
    assert rotated_names(Added().eval(), normal(3, 4, 8)) == set()


def scaled_norm(kind: type[nn.Module]) -> nn.Module:
    norm = kind(8)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_channels_are_balanced_whatever_norm_and_weight_make_of_them(kind, gated):
    torch.manual_seed(0)
    model, x = Normed(scaled_norm(kind), gated).eval(), normal(3, 5, 8)
    want, factors = model(x), torch.tensor([1, 64, 1, 0.25, 1, 32, 1, 2])
    found = []
    for factor in (torch.ones(8), factors):
        with torch.no_grad():
            model.down.weight /= factor
            for parameter in model.norm.parameters():
                parameter *= factor
        gm = canonical(model, x)
        gm = finish(insert_rotation(gm, find_linears(gm)))
        assert torch.allclose(gm(x), want, atol=1e-5)
        affine = torch.stack([value for name, value in gm.named_parameters() if name.startswith("norm.")])
        ratio = gm.get_parameter("down.weight").norm(dim=0) / affine.norm(dim=0)
        assert ratio.min() >= 0.5 and ratio.max() <= 2
        moved = model.norm.weight / gm.get_parameter("norm.weight")
        assert (torch.frexp(moved).mantissa == 0.5).all()  # powers of two
        found.append(dict(gm.named_parameters()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Squared(Normed):
    def forward(self, x):
        y = self.norm(x)
        return x + self.down(y * y)


class Twice(Normed):
    """One linear for two norms."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.other = scaled_norm(nn.LayerNorm)

    def forward(self, x):
        x = x + self.down(self.norm(x))
        return x + self.down(self.other(x))


class Tied(Normed):
    """Its gate is a second name of the weight."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.gate.weight = self.down.weight


@pytest.mark.parametrize(
    "model",
    [
        Squared(scaled_norm(nn.LayerNorm)),
        Twice(scaled_norm(nn.LayerNorm)),
        Tied(scaled_norm(nn.LayerNorm)),
        Normed(scaled_norm(nn.LayerNorm), shared=True),
        Normed(nn.LayerNorm(8, elementwise_affine=False)),
        Normed(nn.LayerNorm((5, 8))),
        Normed(nn.Identity()),
    ],
)
def test_where_the_norm_cannot_be_rescaled_nothing_is(model):
    x = normal(3, 5, 8)
    gm = canonical(model.eval(), x)
    weights = {name: value.clone() for name, value in gm.named_parameters()}
    gm = finish(insert_rotation(gm, find_linears(gm)))
    assert all(torch.equal(value, weights[name]) for name, value in gm.named_parameters())
    assert torch.allclose(gm(x), model(x), atol=1e-5)


def test_a_channel_that_is_nothing_stays():
    model, x = Normed(nn.LayerNorm(8)).eval(), normal(3, 5, 8)
    with torch.no_grad():
        model.down.weight[:, 2:4] = 0
        model.norm.weight[3:5] = 0
    gm = canonical(model, x)
    gm = finish(insert_rotation(gm, find_linears(gm)))
    assert torch.allclose(gm(x), model(x), atol=1e-5)


def test_a_long_tail_costs_far_less():
    torch.manual_seed(0)
    model, x = Cubes().eval(), normal(64, 5, 64)
    with torch.no_grad():
        want = model(x)

    def error(rotation: bool) -> float:
        config = QuantConfig(weight_bits=8, activation_bits=4, rotation=rotation)
        quantized = convert(calibrate(prepare(model, (x,), config), [x], progress=False))
        return (quantized(x) - want).square().mean().item()

    assert error(True) < error(False) / 2


def test_linears_left_in_floating_point_stay_as_they_are(small_vim, images):
    config = QuantConfig(rotation=True, exclude=("*.out_proj",))
    assert not prepare(small_vim, (images,), config).graph.find_nodes(op="call_function", target=ops.rotate.default)
