import math

import pytest
import torch
from helpers.strategies import normal
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.inspection.phenomena import phenomena
from ptq4vm.inspection.statistics import BINS, FINEST, PERCENTILES, QUANTIZED, Activation, Fidelity, Histogram

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def integers(*shape, seed: int = 0) -> torch.Tensor:
    """Returns tensors whose sums are exact in any order."""
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed)).float()


@given(SIZES)
def test_fidelity_does_not_depend_on_batches(sizes):
    x, y = integers(sum(sizes), 7, 3), integers(sum(sizes), 7, 3, seed=1)
    whole, parts = Fidelity(), Fidelity()
    whole.add(x, y)
    for exact, approximate in zip(x.split(sizes), y.split(sizes), strict=True):
        parts.add(exact, approximate)
    assert whole == parts


@given(st.integers(1, 12))
def test_a_bit_more_is_six_decibels(bits):
    x, fidelity = integers(3, 5, 7), Fidelity()
    fidelity.add(x, x * (1 + 2.0**-bits))
    assert fidelity.sqnr == pytest.approx(20 * bits * math.log10(2)) and fidelity.cosine == pytest.approx(1)


def test_without_noise_or_signal_there_is_no_ratio():
    x, exact, silent = integers(2, 3), Fidelity(), Fidelity()
    exact.add(x, x)
    silent.add(0 * x, x)
    assert exact.sqnr is None and exact.cosine == pytest.approx(1)
    assert silent.sqnr is None and silent.cosine is None


@given(SIZES, st.integers(-30, 30))
def test_counts_do_not_depend_on_batches(sizes, exponent):
    x = normal(sum(sizes), 130, 3) * 2.0**exponent
    x[0, :5] *= 1000
    whole, parts = Histogram(130), Histogram(130)
    whole.add(x)
    for part in x.split(sizes):
        parts.add(part)
    assert whole.width == parts.width and torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.percentiles(), parts.percentiles()) and whole.counts.sum() == x.numel()


@given(st.integers(1, 200))
def test_percentiles_are_those_of_each_group_of_tokens(tokens):
    x, histogram = normal(4, tokens, 6, seed=tokens), Histogram(tokens)
    histogram.add(x)
    found = histogram.percentiles()
    assert found.shape == (len(PERCENTILES), min(tokens, FINEST))
    for group in range(found.shape[1]):
        values = x[:, histogram.group == group].flatten().sort().values
        exact = [values[max(0, math.ceil(share / 100 * len(values)) - 1)] for share in PERCENTILES]
        assert found[0, group] == values[0] and found[-1, group] == values[-1]
        assert (found[:, group] - torch.stack(exact)).abs().max() <= histogram.width / 2
    assert histogram.width * BINS <= 4 * x.abs().max()  # as fine as the range allows


def test_zeros_have_percentiles():
    histogram = Histogram(3)
    histogram.add(torch.zeros(2, 3, 4))
    assert torch.equal(histogram.percentiles(), torch.zeros(len(PERCENTILES), 3))


@given(SIZES, st.booleans())
def test_an_activation_does_not_depend_on_batches(sizes, smoothed):
    x, codes = integers(sum(sizes), 4, 6), integers(sum(sizes), 4, 6, seed=1)
    inv_smooth = 2.0 ** torch.arange(6) if smoothed else None
    whole, parts = Activation(4, 6), Activation(4, 6)
    whole.add(x, inv_smooth, codes)
    for value, dequantized in zip(x.split(sizes), codes.split(sizes), strict=True):
        parts.add(value, inv_smooth, dequantized)
    for one, other in (
        (whole.surfaces(), parts.surfaces()),
        (whole.token_lines(), parts.token_lines()),
        (whole.channel_lines(), parts.channel_lines()),
        (whole.bands(), parts.bands()),
    ):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert list(whole.surfaces()) == ["|x|", *["|x / s|"] * smoothed, QUANTIZED]
    assert list(whole.bands()) == ["x / s" if smoothed else "x", QUANTIZED]


def test_the_phenomena_are_those_of_all_images_at_once():
    x, activation = normal(6, 5, 7) * torch.linspace(1, 9, 7), Activation(5, 7)
    for part in x.split(4):
        activation.add(part)
    figures = phenomena(x)
    assert activation.token_variance == pytest.approx(figures.token_variance)
    assert activation.channel_outliers == pytest.approx(figures.channel_outliers)
    assert activation.peak == pytest.approx(float(x.abs().max() / x.square().mean().sqrt()))


def test_a_small_surface_keeps_every_outlier():
    x, activation = torch.ones(1, 300, 500), Activation(300, 500)
    x[0, 123, 456] = 50
    activation.add(x)
    (surface,) = activation.surfaces().values()
    assert surface.shape == (FINEST, FINEST) and surface.max() == 50 and surface.min() == 1
    row, column = divmod(int(surface.argmax()), FINEST)
    assert abs(row / FINEST - 123 / 300) < 1 / FINEST and abs(column / FINEST - 456 / 500) < 1 / FINEST
