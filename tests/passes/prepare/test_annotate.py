"""Choosing linears, what is said of those that a pattern could have meant, and smoothing what a linear saw."""

import pytest
import torch
from helpers.strategies import normal, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ptq4vm import QuantConfig, ops, prepare
from ptq4vm.graph.sites import LinearSite
from ptq4vm.passes.quantized_nodes import QuantizedLinear


class Chain(nn.Sequential):
    def __init__(self, count: int) -> None:
        super().__init__(*(nn.Linear(4, 4) for _ in range(count)))


@pytest.mark.parametrize(("count", "end"), [(2, "0, 1"), (6, "0, 1, 2, 3, 4, 5"), (7, "0, 1, 2, 3, 4, 5, …")])
@pytest.mark.parametrize("key", ["exclude", "eight_bit"])
def test_a_pattern_that_matches_nothing_is_answered_with_six_names_at_most(count, end, key):
    with pytest.raises(ValueError) as error:
        prepare(Chain(count), (torch.ones(2, 3, 4),), QuantConfig(**{key: ("nothing",)}))
    assert str(error.value) == f"{key} pattern 'nothing' matches no linear; there are {end}"


@given(st.booleans(), seeds)
def test_smoothing_a_value_again_is_what_the_graph_does_to_it(rotated, seed):
    """x / s, then the rotation, which is its own inverse: a linear saw R x, and sees R (x / s) now."""
    smooth, x = nn.Parameter(normal(8, seed=seed)), normal(2, 3, 8, seed=seed + 1)
    site = LinearSite(name="linear", weight="w", tokens=3, in_features=8, out_features=4, block=None, rotated=rotated)
    linear = QuantizedLinear(site, None, None, None, smooth)
    now = x * smooth.detach().exp().reciprocal()
    if rotated:
        assert torch.allclose(linear.smoothed(ops.rotate(x)), ops.rotate(now), atol=1e-5 * float(now.abs().max()))
    else:
        assert torch.equal(linear.smoothed(x), now)
    assert QuantizedLinear(site, None, None, None, None).smoothed(x) is x
