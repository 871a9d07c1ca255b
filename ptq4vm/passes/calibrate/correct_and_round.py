"""Corrects biases, and rounds weights by GPTQ, once all scales of a block are chosen."""

from typing import Any

import torch
from torch import Tensor

from ptq4vm.config import QuantConfig
from ptq4vm.graph.partition import NamedTensors
from ptq4vm.passes.calibrate.block_quantizers import BlockQuantizers, run_block
from ptq4vm.passes.calibrate.gptq import Moments, best_ridge, compensated_weight, gptq_codes
from ptq4vm.passes.prepare.bias_correction import correction_of
from ptq4vm.passes.quantized_nodes import QuantizedConvolution, QuantizedLinear, weight_of
from ptq4vm.quantizers import Mode, OutputFakeQuantize
from ptq4vm.quantizers.clusters import Statistics

CORRECTED_IMAGES = 64
"""Images over which the errors of convolutions are averaged."""


def correct_and_round(quantizers: BlockQuantizers, inputs: NamedTensors, config: QuantConfig) -> None:
    """Does what the config wants; `inputs` are those of the block after the blocks quantized so far."""
    if config.bias_correction:
        correct_biases(quantizers, inputs)
    if config.gptq:
        round_weights(quantizers, inputs)


@torch.no_grad()
def correct_biases(quantizers: BlockQuantizers, inputs: NamedTensors) -> None:
    """Sets b - E[x_q (W_q - W)] for all biases of a block.

    Convolutions see the block's quantized inputs, linears what they observed in floating point.
    """
    outputs = {output.name: output.fake for output in quantizers.outputs}
    some = {name: value[:CORRECTED_IMAGES] for name, value in inputs.items()}
    for convolution in quantizers.convolutions:
        if (correction := correction_of(quantizers.prepared, convolution.name)) is not None:
            correction.sub_(_convolution_error(quantizers, convolution, outputs[convolution.name], some))
    for linear in quantizers.linears:
        if (correction := correction_of(quantizers.prepared, linear.name)) is not None:
            correction.copy_(_linear_correction(linear))


def _linear_correction(linear: QuantizedLinear) -> Tensor:
    weight, observed = weight_of(linear), linear.input.observations
    linear.input.mode = linear.weight.mode = Mode.QUANTIZE
    sums = [linear.input(linear.smoothed(x)).flatten(0, -2).double().sum(0) for x in observed]
    mean = torch.stack(sums).sum(0) / sum(x[..., 0].numel() for x in observed)
    return (linear.weight(weight) - weight).double() @ -mean


def _convolution_error(
    quantizers: BlockQuantizers, convolution: QuantizedConvolution, output: OutputFakeQuantize, inputs: NamedTensors
) -> Tensor:
    """Returns the channels' means with the weight rounded, less those with the weight as it is."""
    axis = 1 if convolution.node.target is torch.ops.aten.conv2d.default else 2
    means = []
    for mode in (Mode.QUANTIZE, Mode.PASS):
        quantizers.set_mode(Mode.QUANTIZE)
        convolution.fake.mode = mode
        statistics = Statistics()
        with output.register_forward_pre_hook(lambda _, args, seen=statistics: seen.add(args[0], axis)):
            run_block(quantizers.block, inputs)
        means.append(statistics.sum / statistics.count)
    return means[0] - means[1]


@torch.no_grad()
def round_weights(quantizers: BlockQuantizers, inputs: NamedTensors) -> None:
    """Sets GPTQ's codes, one linear after another: each for the inputs that it has once those before it are rounded."""
    for linear in quantizers.linears:
        weight, moments = weight_of(linear), _moments(quantizers, linear, inputs)
        scale = linear.weight.calculate_qparams()[0]
        try:
            target = compensated_weight(weight, moments, best_ridge(weight, moments))
            linear.weight.codes = gptq_codes(target, scale, linear.weight.spec, moments)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise ValueError(
                f"{linear.name}: GPTQ cannot round its weight ({error}); check the checkpoint and the images, exclude "
                "the layer, or calibrate with gptq=False"
            ) from error


def _moments(quantizers: BlockQuantizers, linear: QuantizedLinear, inputs: NamedTensors) -> Moments:
    """Returns the moments of a linear's input as it was observed and as it comes through the quantized block."""
    weight, observed = weight_of(linear), iter(linear.input.observations)
    moments = Moments(weight.shape[1], weight.device)

    def add(_module: Any, _inputs: Any, x: Tensor) -> None:
        moments.add(linear.smoothed(next(observed)), x)

    with linear.input.register_forward_hook(add):
        quantizers.run(inputs, Mode.QUANTIZE)
    return moments
