"""k-scaled step sizes: what clusters are, how many steps there are, and that they are worth it."""

import pytest
import torch
from helpers.strategies import bits, normal, seeds
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.quantization_specs import IntegerRange, RangeSearch
from ptq4vm.quantizers.clusters import Statistics, cluster, symmetric_scale

SPEC = IntegerRange(bits=8, narrow_range=False)
searches = st.sampled_from([RangeSearch.MINMAX, RangeSearch.SQUARED_ERROR])


def spread(images, tokens, channels, seed):
    """Tokens and channels of very different sizes."""
    x = normal(images, tokens, channels, seed=seed)
    return x * torch.exp(2 * normal(tokens, 1, seed=seed + 1)) * torch.exp(2 * normal(channels, seed=seed + 2))


def steps_of(x, axis, clusters, search=RangeSearch.MINMAX, power_of_two=False, spec=SPEC):
    statistics = Statistics()
    for piece in x.split(2):
        statistics.add(piece, axis)
    return statistics.clustered_scale(clusters, spec, search, power_of_two)


def error(x, axis, steps, spec=SPEC):
    shape = [1] * x.dim()
    shape[axis] = -1
    step = steps.view(shape)
    return ((x / step).round().clamp(*spec.bounds) * step - x).square().mean().item()


@given(st.sampled_from([1, 2, 3, 17, 40]), st.integers(1, 9), seeds)
def test_clusters_are_intervals_of_magnitudes(count, clusters, seed):
    magnitudes = torch.exp(3 * normal(count, seed=seed))
    index = cluster(magnitudes, clusters)
    found = index.unique()
    assert torch.equal(found, torch.arange(len(found))) and len(found) <= clusters
    ordered = index[magnitudes.argsort()]
    assert torch.equal(ordered, ordered.sort().values)
    assert torch.equal(index, cluster(magnitudes, clusters))


def test_groups_that_are_apart_are_found():
    magnitudes = torch.tensor([1.0, 1.1, 900, 30, 31, 1000, 0.9])
    assert cluster(magnitudes, 3).tolist() == [0, 0, 2, 1, 1, 2, 0]
    assert cluster(torch.full((5,), 2.0), 4).tolist() == [0] * 5


@given(st.sampled_from([1, 2]), st.integers(1, 6), searches, st.booleans(), bits, seeds)
def test_there_are_at_most_k_steps(axis, clusters, search, power_of_two, width, seed):
    x, spec = spread(3, 7, 5, seed), IntegerRange(bits=width, narrow_range=False)
    steps = steps_of(x, axis, clusters, search, power_of_two, spec)
    assert steps.shape == (x.shape[axis],) and len(steps.unique()) <= clusters
    if power_of_two:
        ratios = torch.log2(steps / steps.min())
        assert torch.equal(ratios, ratios.round())
    elif search is RangeSearch.MINMAX:
        largest = x.abs().transpose(0, axis).flatten(1).amax(1)
        assert (largest / steps).max() <= (2**width - 1) / 2 * (1 + 1e-6)


@given(st.sampled_from([1, 2]), searches, seeds)
def test_more_steps_err_less(axis, search, seed):
    x = spread(6, 24, 24, seed)
    one, four, all_ = (error(x, axis, steps_of(x, axis, clusters, search)) for clusters in (1, 4, 24))
    assert all_ <= four * (1 + 1e-6) and four < one


@given(bits, seeds)
def test_a_truncation_is_never_worse_than_none(width, seed):
    values, spec = torch.exp(2 * normal(3, 500, seed=seed)), IntegerRange(bits=width, narrow_range=False)
    full, found = (
        symmetric_scale(values, values.amax(1), spec, search) for search in RangeSearch if search != "released"
    )
    for row, a, b in zip(values, full, found, strict=True):
        assert error(row[None], 1, b[None].expand(500), spec) <= error(row[None], 1, a[None].expand(500), spec)
        assert b <= a


def test_maxima_count_beyond_the_values_that_are_kept(monkeypatch):
    monkeypatch.setattr("ptq4vm.quantizers.clusters.KEPT", 10)
    x = torch.ones(8, 3, 4)
    x[7, 1] = 100
    statistics = Statistics()
    for piece in x.split(1):
        statistics.add(piece, 1)
    assert statistics.scale(SPEC, RangeSearch.MINMAX).item() == pytest.approx(100 / 127.5)
    assert sum(sample.numel() for sample in statistics.samples) < 40
    assert torch.equal(statistics.sum, x.double().sum((0, 2)))
