"""Reparameterization: without quantization nothing changes, and factors fold into x_proj."""

import pytest
import torch
from helpers.strategies import normal, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.models.scan_order import Direction, initial_states, scan_tokens
from ptq4vm.ops.scans import scan_states, selective_scan
from ptq4vm.passes.prepare.reparameterize import (
    B_FACTOR,
    C_FACTOR,
    CHANNELS,
    INVERSE_CHANNELS,
    determine_factors,
    set_factors,
)
from ptq4vm.passes.quantized_nodes import quantized_scans
from ptq4vm.quantization_specs import Factors, StateQuantization

DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip")


class Scans(nn.Module):
    """Tokens (B, L, E) of a 3×4 map, scanned along some directions, with what a block has around a scan."""

    def __init__(self, names, channels, states, rank, gate, seed):
        super().__init__()
        self.directions = [Direction.parse(name) for name in names]
        self.gate = gate
        draw = torch.Generator().manual_seed(seed)

        def parameter(*shape):
            return nn.Parameter(torch.randn(shape, generator=draw) / shape[-1] ** 0.5)

        self.x_proj = nn.ParameterList(parameter(rank + 2 * states, channels) for _ in names)
        self.dt_proj = nn.ParameterList(parameter(channels, rank) for _ in names)
        self.dt_bias = nn.ParameterList(parameter(channels) for _ in names)
        self.D = nn.ParameterList(parameter(channels) for _ in names)
        self.A_log = nn.ParameterList(nn.Parameter(initial_states(channels, states)) for _ in names)

    def forward(self, x):
        total = torch.zeros_like(x)
        for i, direction in enumerate(self.directions):
            u = direction.scan(x, 3, 4)
            weights = (self.x_proj[i], self.dt_proj[i], self.dt_bias[i], self.A_log[i], self.D[i])
            total = total + direction.restore(scan_tokens(u, u if self.gate else None, *weights), 3, 4)
        return total


@settings(max_examples=8)
@given(
    names=st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=4, unique=True),
    channels=st.sampled_from([1, 3, 8]),
    states=st.sampled_from([1, 2, 16]),
    rank=st.sampled_from([1, 3]),
    gate=st.booleans(),
    integrate=st.booleans(),
    spread=st.sampled_from([0.5, 2.0, 6.0]),
    seed=seeds,
)
def test_nothing_changes_without_quantization(names, channels, states, rank, gate, integrate, spread, seed):
    model = Scans(names, channels, states, rank, gate, seed)
    x = normal(2, 12, channels, seed=seed)
    config = QuantConfig(exclude=("*",), state=StateQuantization(integrate=integrate))
    prepared = prepare(model, (x,), config)
    scans = quantized_scans(prepared)
    assert len(scans) == len(names)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for scan in scans:
            factors = (torch.exp(spread * torch.randn(n, generator=draw)) for n in (channels, states))
            set_factors(prepared, scan.name, *factors)
        exact = model.double()(x.double())
        assert (prepared(x) - exact).abs().max() <= 1e-5 * exact.abs().max()


@given(seed=seeds, integrate=st.booleans())
@settings(max_examples=4)
def test_powers_of_two_fold_exactly(seed, integrate):
    """Integrated or not, and not multiplied at all: the same bits."""
    model, x = Scans(("h", "v_flip"), 4, 3, 2, True, seed), normal(3, 12, 4, seed=seed)
    prepared = prepare(model, (x,), QuantConfig(exclude=("*",), state=StateQuantization(integrate=integrate)))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for scan in quantized_scans(prepared):
            set_factors(prepared, scan.name, *(2.0 ** torch.randint(-9, 9, (n,), generator=draw) for n in (4, 3)))
        assert torch.equal(
            prepared(x), prepare(model, (x,), QuantConfig(exclude=("*",), state=StateQuantization(factors=None)))(x)
        )


def test_integrated_factors_are_in_x_proj_and_cost_nothing():
    model, x = Scans(("h", "v"), 4, 3, 2, False, 0), normal(6, 12, 4)
    config = QuantConfig(exclude=("*",), state=StateQuantization())
    with_them, without = (
        convert(calibrate(prepare(model, (x,), QuantConfig(exclude=("*",), state=state)), [x], progress=False))
        for state in (config.state, StateQuantization(factors=None))
    )
    counts = [
        len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)) for gm in (with_them, without)
    ]
    assert counts[0] == counts[1] + 4  # r_C before and after each scan
    for node in with_them.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        assert node.args[1].op == "get_attr"


def test_powers_are_those_of_the_paper():
    """R_* is the mean over the other axes, r_* = R_*^p_*, and the exponents sum to one."""
    mean = normal(5, 3, 4, seed=1).abs()
    channels, tokens, states = determine_factors(Factors.POWERS, mean, mean)
    means = mean.mean((0, 1)), mean.mean((1, 2)), mean.mean((0, 2))
    powers = [
        torch.log(found) / torch.log(wanted) for found, wanted in zip((channels, tokens, states), means, strict=True)
    ]
    spread = torch.stack([value.std(correction=0) for value in means])
    for power, share in zip(powers, spread / spread.sum(), strict=True):
        assert torch.allclose(power, share.expand_as(power), rtol=1e-3)


@given(seed=seeds, spread=st.sampled_from([0.1, 1.0]))
def test_maxima_leave_nothing_above_one(seed, spread):
    """And every channel, every state and every token of states that are a product of the three reaches it."""
    factors = [torch.exp(spread * normal(n, seed=seed + i)) for i, n in enumerate((4, 5, 3))]
    product = factors[0] * factors[2].view(-1, 1) * factors[1].view(-1, 1, 1)
    for largest, exact in ((product, True), (product * normal(5, 3, 4, seed=seed).abs(), False)):
        channels, tokens, states = determine_factors(Factors.MAXIMA, largest, largest)
        left = largest / (channels * states.view(-1, 1) * tokens.view(-1, 1, 1))
        assert left.max() <= 1 + 1e-5
        if exact:
            assert torch.allclose(left, torch.ones_like(left), rtol=1e-4)


@pytest.mark.parametrize("factors", Factors)
def test_seeing_every_image_twice_changes_nothing(factors):
    """The factors are of a mean or a maximum over images, however many and in however many batches."""
    model, x = Scans(("h",), 4, 3, 2, False, 0), normal(6, 12, 4)
    config = QuantConfig(exclude=("*",), state=StateQuantization(factors=factors))
    once, twice = (calibrate(prepare(model, (x,), config), batches, progress=False) for batches in ([x], [x, x]))
    (scan,) = quantized_scans(once)
    names = [f"{scan.name}.{leaf}" for leaf in (CHANNELS, INVERSE_CHANNELS, B_FACTOR, C_FACTOR)]
    found, again = ({name: gm.get_buffer(name) for name in names} for gm in (once, twice))
    assert all(value.unique().numel() > 1 for value in found.values())
    assert all(torch.allclose(again[name], value, rtol=1e-5) for name, value in found.items())


@pytest.mark.parametrize("factors", Factors)
def test_states_of_one_size_have_no_factors(factors):
    for size in (1.0, 0.0):
        found = determine_factors(factors, torch.full((5, 3, 4), size), torch.full((5, 3, 4), size))
        assert all(torch.allclose(value, torch.ones_like(value)) for value in found)


@pytest.mark.parametrize("factors", Factors)
def test_a_channel_that_stays_zero_has_a_factor_one_can_divide_by(factors):
    largest = torch.ones(5, 3, 4)
    largest[:, :, 1], largest[:, 2] = 0, 0
    for values in determine_factors(factors, largest, largest):
        assert values.min() >= 0.99e-4 * values.max()


@given(seed=seeds, images=st.integers(1, 3), tokens=st.sampled_from([1, 2, 19]), states=st.sampled_from([1, 3]))
def test_the_states_of_a_scan(seed, images, tokens, states):
    """Read one state at a time, with C = 1 for it."""
    u, delta, B = (normal(images, tokens, n, seed=seed + i) for i, n in enumerate((5, 5, states)))
    A = -normal(5, states, seed=seed).abs()
    found = torch.cat(list(scan_states(u, delta, A, B, None, True)))
    for s in range(states):
        C = torch.zeros(images, tokens, states)
        C[..., s] = 1
        h = selective_scan(u, delta, A, B, C, None, None, None, True)
        assert torch.allclose(found[:, :, s].transpose(0, 1), h, rtol=1e-5, atol=1e-6)
