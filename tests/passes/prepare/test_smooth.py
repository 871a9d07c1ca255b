"""x (B, L, D), W (N, D), s (D,)."""

import pytest
import torch
from helpers.graphs import canonical, passed
from helpers.strategies import integers, normal, powers_of_two, seeds
from hypothesis import given
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.graph.pipeline import clean_up
from ptq4vm.graph.sites import LinearSite, find_linears, sites_of
from ptq4vm.passes.calibrate.choose_qparams import _root_mean_square
from ptq4vm.passes.prepare.smooth import fold_smoothing, insert_smoothing, smoothing_scale

aten = torch.ops.aten


def smoothed(model: nn.Module, x: torch.Tensor):
    return passed(insert_smoothing, model, x)


class Two(nn.Module):
    """Whole numbers with a power of two between the layers: every sum is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = integers(-8, 7, *parameter.shape, seed=i).float()

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def x():
    return integers(-8, 7, 3, 4, 6).float()


def test_it_begins_as_the_identity(x, small_vim, images):
    assert torch.equal(smoothed(Two(), x)(x), Two()(x))
    assert torch.equal(smoothed(small_vim, images)(images), small_vim(images))


@pytest.fixture(scope="module")
def without_exp(x):
    """The parameters are s itself: exp(log 2) is not exactly 2."""
    gm = smoothed(Two(), x)
    for node in gm.graph.find_nodes(op="call_function", target=aten.exp.default):
        node.replace_all_uses_with(node.args[0])
    return clean_up(gm)


@given(seed=seeds)
def test_powers_of_two_change_nothing(without_exp, seed):
    for i, name in enumerate(("first.log_smooth", "second.log_smooth")):
        parameter = without_exp.get_parameter(name)
        parameter.data = powers_of_two(len(parameter), seed=seed + i)
    x = integers(-8, 7, 3, 4, 6, seed=seed).float()
    assert torch.equal(without_exp(x), Two()(x))


def test_one_parameter_a_linear_that_does_not_learn_yet(small_vim, images):
    gm = smoothed(small_vim, images)
    names = [name for name, _ in gm.named_parameters() if name.endswith(".log_smooth")]
    assert sorted(names) == sorted(
        f"{site.name}.log_smooth" for site in find_linears(canonical(small_vim, images)).values()
    )
    assert sorted(names) == sorted(site.log_smooth for site in sites_of(gm, LinearSite).values())
    assert not any(gm.get_parameter(name).requires_grad for name in names)


def test_each_linear_reads_its_input_and_its_weight_through_a_product(x):
    gm = smoothed(Two(), x)
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        assert [argument.target for argument in node.args[:2]] == [aten.mul.Tensor, aten.mul.Tensor]
        assert node.args[0].args[1].target is aten.reciprocal.default


def test_folding_keeps_the_function_and_leaves_one_constant(x):
    gm = smoothed(Two(), x)
    for i, (name, parameter) in enumerate(gm.named_parameters()):
        if name.endswith("log_smooth"):
            parameter.data = torch.linspace(-1, 1, len(parameter)) + i
    before = gm(x)
    folded = clean_up(fold_smoothing(gm))
    assert torch.equal(folded(x), before)
    assert not folded.graph.find_nodes(op="call_function", target=aten.reciprocal.default)
    want = folded.get_parameter("first.log_smooth").exp().reciprocal()
    assert torch.equal(folded.get_buffer("first.inv_smooth"), want)
    code = folded.code
    assert clean_up(fold_smoothing(folded)).code == code


def test_folding_leaves_other_reciprocals_alone():
    class Inverse(nn.Module):
        def forward(self, x):
            return torch.reciprocal(torch.exp(x))

    x = torch.ones(2, 3)
    gm = capture(Inverse(), (x,))
    code = gm.code
    assert clean_up(fold_smoothing(gm)).code == code


# --- SmoothQuant's vector ---


@given(seeds)
def test_alpha_half_balances_inputs_and_weights(seed):
    x_max, weight = powers_of_two(7, seed=seed, low=-4) ** 2, powers_of_two(5, 7, seed=seed + 1, low=-4) ** 2
    scale = smoothing_scale(x_max, weight.abs().amax(0), 0.5)
    assert torch.equal(x_max / scale, (weight * scale).abs().amax(0))


@given(seeds)
def test_the_ends_of_alpha_flatten_one_side(seed):
    x_max, weight = powers_of_two(7, seed=seed), powers_of_two(5, 7, seed=seed + 1)
    assert torch.equal(x_max / smoothing_scale(x_max, weight.abs().amax(0), 1.0), torch.ones(7))
    assert torch.equal((weight * smoothing_scale(x_max, weight.abs().amax(0), 0.0)).abs().amax(0), torch.ones(7))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_silent_channels_have_a_finite_positive_scale(alpha):
    scale = smoothing_scale(torch.zeros(3), torch.zeros(3), alpha)
    assert torch.isfinite(scale).all() and torch.isfinite(1 / scale).all() and (scale > 0).all()


def test_floors_are_those_of_the_released_code():
    """max|X| at least 1e-3, max|W| and s at least 1e-5."""
    zero, one = torch.zeros(1), torch.ones(1)
    assert smoothing_scale(zero, one, 1.0).item() == pytest.approx(1e-3)
    assert smoothing_scale(one, zero, 0.0).item() == pytest.approx(1e5)
    assert smoothing_scale(one, one * 1e8, 0.0).item() == pytest.approx(1e-5)
    assert smoothing_scale(zero, zero, 0.5).item() == pytest.approx(10)


@given(seeds)
def test_root_mean_squares_do_not_overflow(seed):
    rows = normal(5, 7, seed=seed)
    assert torch.allclose(_root_mean_square(rows * 2.0**80) / 2.0**80, _root_mean_square(rows))
