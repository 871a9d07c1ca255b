"""The paper's three phenomena, counted in plain Python. x (B, L, D) holds whole numbers, so that sums are exact."""

import statistics

import pytest
import torch
from helpers.strategies import integers, positive_sizes, seeds
from hypothesis import given

from ptq4vm.config import QuantConfig
from ptq4vm.inspection.phenomena import Phenomena, observe, phenomena
from ptq4vm.passes.quantized_nodes import quantized_linears
from ptq4vm.quantizers import Mode


@given(positive_sizes, positive_sizes, positive_sizes, seeds)
def test_figures_are_ratios_of_sizes(images, tokens, channels, seed):
    x = integers(-100, 99, images, tokens, channels, seed=seed).float() + 0.5  # never zero
    size = x.abs().tolist()
    per_token = [statistics.fmean(max(image[t]) for image in size) for t in range(tokens)]
    per_channel = sorted(max(token[c] for image in size for token in image) for c in range(channels))
    every = sorted(value for image in size for token in image for value in token)
    found = phenomena(x)
    assert found.token_variance == pytest.approx(max(per_token) / min(per_token), rel=1e-6)
    assert found.channel_outliers == pytest.approx(per_channel[-1] / per_channel[(channels - 1) // 2], rel=1e-6)
    assert found.long_tail == pytest.approx(every[-1] / every[max(1, round(0.98 * len(every))) - 1], rel=1e-6)


def test_silent_tokens_and_channels_have_finite_figures():
    x = torch.zeros(2, 3, 4)
    x[0, 1, 2] = 1
    for value in phenomena(x).to_dict().values():
        assert 0 <= value < float("inf")


def test_a_dict_has_the_three_names():
    figures = Phenomena(token_variance=1.0, channel_outliers=2.0, long_tail=3.0)
    assert figures.to_dict() == {"token_variance": 1.0, "channel_outliers": 2.0, "long_tail": 3.0}


def test_a_model_is_observed_in_floating_point_over_all_batches(roads, images):
    """And quantizes afterwards as it did before; inputs are those that a hook would see."""
    gm = roads.prepared(QuantConfig.minmax(4))
    before = gm(images)
    found = observe(gm, images.split(5))
    assert torch.equal(gm(images), before)
    linears = quantized_linears(gm)
    assert list(found) == [linear.name for linear in linears] and len(found) == 12
    assert all(linear.input.observations == [] and linear.input.mode is Mode.PASS for linear in linears)
    assert found == observe(gm, [images])


def test_a_calibrated_model_is_refused(roads, images):
    with pytest.raises(ValueError, match="prepared model that is not calibrated yet"):
        observe(roads.calibrated(QuantConfig.minmax(8)), [images])
