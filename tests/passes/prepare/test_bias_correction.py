"""Bias correction: on average a quantized weight then errs by nothing."""

import pytest
import torch
from helpers.strategies import normal
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, ops, prepare
from ptq4vm.passes.prepare.bias_correction import correction_of
from ptq4vm.passes.quantized_nodes import quantized_convolutions, quantized_linears
from ptq4vm.quantization_specs import OutputQuantization

COARSE = QuantConfig.minmax(8, weights={"bits": 3}, bias_correction=True)


class Biases(nn.Module):
    """Biases of a linear, of a scan's step, of another linear's sum; and a linear without any."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def parameter(*shape):
            return nn.Parameter(torch.randn(shape, generator=draw))

        self.own, self.without = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.weight, self.step, self.bias = parameter(8, 8), parameter(8, 8), parameter(8)
        self.delta_bias, self.A = parameter(8), nn.Parameter(-parameter(8, 2).detach().abs())

    def forward(self, x):
        y = nn.functional.linear(self.own(x), self.weight) + self.bias
        delta = nn.functional.linear(y, self.step)
        y = ops.selective_scan(y, delta, self.A, y[..., :2], y[..., 2:4], None, None, self.delta_bias, True)
        return self.without(y)


def prepared(config):
    x = 1 + normal(32, 5, 8)
    gm = prepare(Biases(), (x,), config)
    return calibrate(gm, [x], progress=False), x


def test_every_bias_is_found():
    gm, _ = prepared(COARSE)
    found = {name: correction_of(gm, name) for name in ("own", "weight_linear", "step_linear", "without")}
    assert [name for name, value in found.items() if value is None] == ["without"]
    assert all(value.abs().max() > 1e-3 for value in found.values() if value is not None)


def test_the_first_linear_errs_by_nothing_on_average():
    """Its error is that of the rounded weight; that of the inputs' rounding is not corrected."""
    gm, x = prepared(COARSE)
    linear = quantized_linears(gm)[0]
    inputs = linear.input(x)
    rounded, exact = linear.weight(gm.own.weight), gm.own.weight
    error = (inputs @ (rounded - exact).t()).mean((0, 1))
    assert torch.allclose(error + correction_of(gm, "own"), torch.zeros(8), atol=1e-5) and error.abs().max() > 1e-3


def test_corrections_are_in_the_constants_of_the_integer_model():
    gm, x = prepared(COARSE)
    lowered = convert(gm)
    with torch.no_grad():
        assert torch.equal(convert(gm, lower=False)(x), gm(x))
        assert (lowered(x) - gm(x)).abs().max() <= 1e-4 * gm(x).abs().max()
    assert not [name for name in lowered.state_dict() if name.endswith("bias_correction")]


@pytest.mark.slow
def test_convolutions_err_by_nothing_on_average(roads, images):
    config = QuantConfig.kscaled(outputs=OutputQuantization(bits=4), weights={"bits": 4})
    gm = roads.calibrated(config)
    names = [convolution.name for convolution in quantized_convolutions(gm)]
    assert len(names) == 5 and all(correction_of(gm, name).any() for name in names)
    convolution = quantized_convolutions(gm)[0]
    weight, bias = gm.patch_embed.proj.weight, gm.patch_embed.proj.bias
    rounded = nn.functional.conv2d(images, convolution.fake(weight), bias, 4).mean((0, 2, 3))
    exact = nn.functional.conv2d(images, weight, bias, 4).mean((0, 2, 3))
    assert (rounded - exact).abs().max() > 1e-3
    assert torch.allclose(rounded + correction_of(gm, convolution.name), exact, atol=1e-5)
