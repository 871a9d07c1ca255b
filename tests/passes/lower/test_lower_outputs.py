"""Outputs with scales of channels: in the integer model they are divided by them, rounded, and multiplied again."""

import torch
from helpers.strategies import normal
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.quantization_specs import OutputQuantization, RangeSearch

CONFIG = QuantConfig(
    activations={"symmetric": True, "granularity": "per_tensor"},
    smoothing=None,
    range_search=RangeSearch.MINMAX,
    outputs=OutputQuantization(bits=8, k_scaled=True),
)


def test_channels_keep_the_scales_that_calibration_gave_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-1, 2, 8).view(-1, 1))
    x = normal(4, 5, 6)
    gm = calibrate(prepare(model, (x,), CONFIG), [x], progress=False)
    with torch.no_grad():
        want, lowered = gm(x), convert(gm)
        steps = [value for name, value in lowered.named_buffers() if name.endswith("output_inv_steps")]
        assert [len(value.unique()) > 1 for value in steps] == [True]
        assert (lowered(x) - want).abs().max() <= 1e-4 * want.abs().max()
