"""Floors of SmoothQuant's vector, as PTQ4VM's released code has them."""

import pytest
import torch

from ptq4vm.passes.prepare.smooth import smoothing_scale


@pytest.mark.parametrize(
    ("largest_x", "largest_w", "alpha", "scale"),
    [
        (0.0, 4.0, 1.0, 1e-3),  # an input of zeros counts as 1e-3
        (2e-3, 4.0, 1.0, 2e-3),
        (1.0, 0.0, 0.0, 1e5),  # a weight of zeros counts as 1e-5
        (1.0, 1e-4, 0.0, 1e4),
        (1.0, 1e6, 0.0, 1e-5),  # no scale is below 1e-5
        (1.0, 5e4, 0.0, 2e-5),
        (4.0, 9.0, 0.5, 2 / 3),
    ],
)
def test_floors_are_those_of_the_paper(largest_x, largest_w, alpha, scale):
    found = smoothing_scale(torch.tensor([largest_x]), torch.tensor([largest_w]), alpha)
    assert found.item() == pytest.approx(scale, rel=1e-5)
