"""Directions are permutations; the gate and the scan are what the papers say."""

import pytest
import torch
import torch.nn.functional as F
from helpers.public_models import order
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.models.scan_order import ChannelGate, Direction, initial_dt_, initial_states, scan_tokens
from ptq4vm.ops import scans

names = st.builds(
    "{}{}".format, st.sampled_from(["h", "v"]) | st.integers(1, 9).map("w{}".format), st.sampled_from(["", "_flip"])
)
sides = st.integers(1, 9)


@given(names, sides, sides)
def test_a_direction_reads_tokens_in_the_order_it_is_named_after(name, height, width):
    x = torch.arange(1.0, 2 * height * width + 1).reshape(1, -1, 2)
    scanned = Direction.parse(name).scan(x, height, width)
    want = torch.stack([x[0, i] if i is not None else torch.zeros(2) for i in order(name, height, width)])
    assert torch.equal(scanned[0], want)
    assert Direction.parse(name).length(height, width) == len(want)


@given(names, sides, sides, st.integers(0, 3))
def test_restoring_undoes_the_scan(name, height, width, batch):
    direction, x = Direction.parse(name), torch.randn(batch, height * width, 3)
    assert torch.equal(direction.restore(direction.scan(x, height, width), height, width), x)


@given(names)
def test_a_flip_is_the_reverse(name):
    x = torch.randn(2, 15, 4)
    other = name.removesuffix("_flip") if name.endswith("_flip") else f"{name}_flip"
    assert torch.equal(Direction.parse(name).scan(x, 3, 5).flip(1), Direction.parse(other).scan(x, 3, 5))


@pytest.mark.parametrize("name", ["", "w", "w0", "x", "h_flop", "w7flip", "hv", "W2"])
def test_an_unknown_direction_is_an_error(name):
    with pytest.raises(ValueError, match=f"'{name}' is no scan direction"):
        Direction.parse(name)


def test_a_scan_projects_its_steps_and_its_matrices_from_its_input():
    torch.manual_seed(0)
    E, S, R = 6, 3, 2
    u, z = torch.randn(2, 2, 7, E)
    x_proj, dt_proj, bias = torch.randn(R + 2 * S, E), torch.randn(E, R), torch.randn(E)
    A_log, D = torch.randn(E, S), torch.randn(E)
    projected = u @ x_proj.T
    delta, B, C = projected[..., :R] @ dt_proj.T, projected[..., R : R + S], projected[..., R + S :]
    want = scans.selective_scan(u, delta, -A_log.exp(), B, C, D, z, bias, True)
    assert torch.allclose(scan_tokens(u, z, x_proj, dt_proj, bias, A_log, D), want, atol=1e-6)


def test_the_gate_is_one_factor_a_channel_from_the_mean_token():
    torch.manual_seed(0)
    gate, y = ChannelGate(16), torch.randn(2, 5, 16)
    mean = F.layer_norm(y, (16,), gate.norm.weight, gate.norm.bias, 1e-5).mean(1)
    reduced = F.gelu(mean @ gate.global_reduce.weight.T + gate.global_reduce.bias)
    factor = torch.sigmoid(reduced @ gate.channel_select.weight.T + gate.channel_select.bias)
    assert gate.global_reduce.out_features == 2
    assert torch.allclose(gate(y), y * factor[:, None], atol=1e-6)


def test_initial_values_are_mambas():
    torch.manual_seed(0)
    assert torch.equal(initial_states(5, 4), torch.arange(1, 5).log().expand(5, 4))
    weight, bias = torch.empty(4, 500, 3), torch.empty(4, 500)
    initial_dt_(weight, bias)
    step = F.softplus(bias)
    assert 0.99e-3 <= step.min() < 1.2e-3 and 0.09 < step.max() <= 0.101
    assert weight.abs().max() <= 3**-0.5
