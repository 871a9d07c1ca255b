"""Laws of rotations."""

import pytest
import torch
from helpers.strategies import normal, seeds
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.ops import rotation

CHANNELS = st.integers(1, 300)


@given(CHANNELS, seeds)
def test_a_rotation_keeps_products_and_is_its_own_inverse(channels, seed):
    x, y = normal(2, 3, channels, seed=seed), normal(2, 3, channels, seed=seed + 1)
    a, b = rotation.rotate(x), rotation.rotate(y)
    assert torch.allclose((a * b).sum(-1), (x * y).sum(-1), atol=1e-4 * channels**0.5)
    assert torch.allclose(rotation.rotate(a), x, atol=1e-5)


@given(st.integers(0, 7), st.sampled_from(range(1, rotation.LARGEST_HARTLEY + 1, 2)))
def test_a_rotation_spreads_one_channel_over_all(power, size):
    channels = size * 2**power
    entries = rotation.rotate(torch.eye(channels)).abs()
    assert entries.min() > 0 and entries.max() <= (2 / channels) ** 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("channels", [17, 2 * 17, 8 * 101])
def test_a_large_odd_factor_is_not_mixed(channels):
    order = channels & -channels
    entries = rotation.rotate(torch.eye(channels)).abs()
    assert torch.allclose(entries.sort().values[:, -order:], torch.full((channels, order), order**-0.5))
    assert entries.ne(0).sum() == channels * order
