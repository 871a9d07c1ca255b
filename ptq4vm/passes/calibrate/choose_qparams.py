"""Chooses scales, smoothing vectors and factors of one block from what its quantizers observed in floating point."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq4vm import ops
from ptq4vm.config import QuantConfig
from ptq4vm.graph.partition import NamedTensors
from ptq4vm.passes.calibrate.block_quantizers import BlockQuantizers
from ptq4vm.passes.prepare.reparameterize import determine_factors, set_factors
from ptq4vm.passes.prepare.smooth import smoothing_scale
from ptq4vm.passes.quantized_nodes import QuantizedLinear, QuantizedScan, quantized_outputs, weight_of
from ptq4vm.quantization_specs import Granularity
from ptq4vm.quantizers.clusters import Statistics


@torch.no_grad()
def collect(quantizers: BlockQuantizers, inputs: NamedTensors, config: QuantConfig) -> NamedTensors:
    """Runs a block in floating point while its quantizers observe; returns its outputs.

    States come first, in a run of their own: their factors change what x_proj returns.
    """
    if quantizers.scans:
        quantizers.observe(inputs, [scan.fake for scan in quantizers.scans])
        for scan in quantizers.scans:
            _choose_state(quantizers, scan, config)
    linears, outputs = quantizers.linears, quantizers.outputs
    return quantizers.observe(inputs, [*(linear.input for linear in linears), *(output.fake for output in outputs)])


def _choose_state(quantizers: BlockQuantizers, scan: QuantizedScan, config: QuantConfig) -> None:
    """Sets factors and scale of a scan's state; a factor of tokens is in the scale."""
    assert config.state is not None
    states = scan.fake.observations
    if not torch.isfinite(states.largest).all():
        raise ValueError(f"{scan.name}: its state has values that are not finite; check the checkpoint and the images")
    if config.state.factors is not None:
        channels, tokens, factors = determine_factors(config.state.factors, states.total / states.count, states.largest)
        set_factors(quantizers.prepared, scan.name, channels, factors)
    else:
        channels, tokens, factors = (torch.ones(n) for n in (states.total.shape[2], 1, states.total.shape[1]))
    scan.fake.choose_qparams(channels * factors.view(-1, 1), tokens, config.state.per_token, config.range_search)


@torch.no_grad()
def choose_qparams(quantizers: BlockQuantizers, config: QuantConfig) -> None:
    """Sets output scales first: a linear's input may share the scale of an output of this or an earlier block."""
    for output in quantizers.outputs:
        output.fake.choose_qparams(config)
    for convolution in quantizers.convolutions:
        weight = weight_of(convolution)
        _check_weight(convolution.name, weight)
        convolution.fake.choose_qparams(weight, config)
    scales = {output.name: output.fake.scale for output in quantized_outputs(quantizers.prepared)}
    for linear in quantizers.linears:
        _choose_linear(linear, scales, config)


def _choose_linear(linear: QuantizedLinear, output_scales: Mapping[str, Tensor | None], config: QuantConfig) -> None:
    """Sets smoothing vector and scales of a linear's input and weight."""
    x = torch.cat(linear.input.observations).float()
    _check_weight(linear.name, weight_of(linear))
    _check_finite(linear, x)
    if linear.input.shares_qparams_with is not None:
        scale = output_scales[linear.input.shares_qparams_with]
        assert scale is not None
        linear.input.set_qparams(scale)
    else:
        _set_smoothing(linear, x, config)
        linear.input.choose_qparams(linear.smoothed(x), config)
    smoothed = weight_of(linear)
    _check_weight(f"{linear.name}, smoothed", smoothed)
    linear.weight.choose_qparams(smoothed, config)


def _set_smoothing(linear: QuantizedLinear, x: Tensor, config: QuantConfig) -> None:
    """Sets s for x (images, L, D); with `K_SCALED_CHANNEL` it is the scale of the channels."""
    if linear.smooth is None:
        return
    if config.activations.granularity is Granularity.K_SCALED_CHANNEL:
        search, spec = config.range_search, linear.input.spec
        scale = Statistics.of(x, 2).clustered_scale(config.activations.clusters, spec, search, config.power_of_two)
    else:
        assert config.smoothing is not None
        scale = smoothing_scale(*_sizes(linear, x), config.smoothing)
    linear.smooth.copy_(scale.log())


def _check_weight(name: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{name}: {bad} of its {weight.numel()} weights are not finite; check the checkpoint")


def _check_finite(linear: QuantizedLinear, x: Tensor) -> None:
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise ValueError(
            f"{linear.name}: its input has values that are not finite for {bad} of {len(x)} calibration images; "
            "check the checkpoint and the images, or exclude the layer"
        )


def _sizes(linear: QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how large the channels of x and of W are: their maxima, which scales grow with.

    Before a rotation, their root mean squares: both errors then grow with Σ|x_d / s_d|² · Σ|W_d · s_d|², which is least
    for s = |x| / |W|.
    """
    weight = weight_of(linear)
    if linear.site.rotated:
        return _root_mean_square(ops.rotate(x).flatten(0, 1)), _root_mean_square(ops.rotate(weight))
    return x.abs().amax((0, 1)), weight.abs().amax(0)


def _root_mean_square(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=0)
    if not torch.isfinite(norm).all():  # squares overflow float32 from 1e19 on
        norm = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).to(rows.dtype)
    return norm / len(rows) ** 0.5
