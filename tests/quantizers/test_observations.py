"""Observations of many batches are those of all of them; u (B, L, E), B (B, L, S)."""

import torch
from helpers.strategies import normal, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm.quantizers.clusters import Statistics
from ptq4vm.quantizers.scan import StateStatistics

cuts = st.integers(1, 5)


@given(cuts, st.sampled_from([1, 2]), seeds)
def test_statistics_of_batches_are_those_of_all_images(cut, axis, seed):
    x = normal(6, 3, 4, seed=seed)
    whole, pieces = Statistics.of(x, axis), Statistics()
    for piece in x.split([cut, 6 - cut]):
        pieces.add(piece, axis)
    sizes = x.abs().transpose(0, axis).flatten(1)
    assert torch.equal(pieces.largest, sizes.amax(1)) and torch.equal(whole.largest, pieces.largest)
    assert pieces.count == whole.count == sizes.shape[1]
    assert torch.allclose(pieces.sum, whole.sum) and torch.allclose(pieces.size, sizes.double().sum(1))


@settings(max_examples=10)
@given(cuts, seeds)
def test_states_of_batches_are_those_of_all_images(cut, seed):
    u, delta = normal(6, 5, 3, seed=seed), normal(6, 5, 3, seed=seed + 1).exp()
    A, B = -normal(3, 2, seed=seed + 2).exp(), normal(6, 5, 2, seed=seed + 3)
    whole, pieces = StateStatistics(), StateStatistics()
    whole.add(u, delta, A, B, None, None, None, None, False)
    for piece in zip(*(value.split([cut, 6 - cut]) for value in (u, delta, B)), strict=True):
        pieces.add(*piece[:2], A, piece[2], None, None, None, None, False)
    assert pieces.count == whole.count == 6
    assert torch.equal(pieces.largest, whole.largest)
    assert torch.allclose(pieces.total, whole.total)
