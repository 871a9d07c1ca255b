"""Step sizes, smoothing vectors and factors of one block from what its quantizers saw in floating point."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq4vm import ops
from ptq4vm.config import QuantConfig
from ptq4vm.graph.partition import Part
from ptq4vm.passes.calibrate.clusters import Statistics, symmetric_scale
from ptq4vm.passes.calibrate.jlss import Values, weight_of
from ptq4vm.passes.calibrate.observers import Members, Seen, States, run_part
from ptq4vm.passes.calibrate.range_search import input_qparams, weight_scale
from ptq4vm.passes.prepare.bias_correction import correction_of
from ptq4vm.passes.prepare.reparameterize import determine_factors, set_factors
from ptq4vm.passes.prepare.smooth import smoothing_scale
from ptq4vm.passes.quantized import QuantizedConvolution, QuantizedLinear, convolution_weight
from ptq4vm.quantizers import Mode, ScanFakeQuantize
from ptq4vm.specs import Granularity, IntegerRange, WeightGranularity

CORRECTED_IMAGES = 64
"""Images over which the errors of convolutions are averaged."""


@torch.no_grad()
def set_states(members: Members, states: Mapping[ScanFakeQuantize, States], config: QuantConfig) -> None:
    """Factors and step sizes of the scans' states; a factor of tokens is in the step sizes."""
    assert config.state is not None
    for scan in members.scans:
        found, spec = states[scan.fake], scan.fake.spec
        if not torch.isfinite(found.largest).all():
            raise ValueError(
                f"{scan.name}: its state has values that are not finite; check the checkpoint and the images"
            )
        if config.state.factors is not None:
            mean = found.total / found.count
            channels, tokens, factors = determine_factors(config.state.factors, mean, found.largest)
            set_factors(members.gm, scan.name, channels, factors)
        else:
            channels, tokens, factors = (torch.ones(n) for n in (found.total.shape[2], 1, found.total.shape[1]))
        scaled = channels * factors.view(-1, 1)
        if not config.state.per_token:
            scaled = scaled * tokens.view(-1, 1, 1)
        rows = 1 if not config.state.per_token else len(found.total)
        largest = (found.largest / scaled).reshape(rows, -1).amax(1)
        sample = (found.sample / scaled.unsqueeze(-3)).reshape(rows, -1)
        step = symmetric_scale(sample, largest, spec, config.range_search)
        scan.fake.scale = step if config.state.per_token else step * tokens


@torch.no_grad()
def set_ranges(whole: Members, members: Members, seen: Seen, config: QuantConfig) -> None:
    """Of outputs first, since inputs of linears may follow those of any block so far."""
    for output in members.outputs:
        statistics, fake = seen.outputs[output.fake], output.fake
        if not torch.isfinite(statistics.largest).all():
            raise ValueError(f"{output.name}: it gives values that are not finite; check the checkpoint and the images")
        single = fake.granularity is Granularity.PER_TENSOR
        search = config.range_search
        fake.scale = (
            statistics.step_size(fake.spec, search)
            if single
            else statistics.step_sizes(config.activations.clusters, fake.spec, search, fake.power_of_two)
        )
    for convolution in members.convolutions:
        weight = convolution.weight
        _check_weight(convolution.name, convolution_weight(members.gm, convolution))
        weight.scale = _weight_scale(convolution_weight(members.gm, convolution).flatten(1), weight.spec, config)
    scales = {output.name: output.fake.scale for output in whole.outputs}
    for linear in members.linears:
        x = torch.cat(seen.inputs[linear.input]).float()
        _check_weight(linear.name, weight_of(linear))
        _check_finite(linear, x)
        if linear.input.follows is not None:
            scale = scales[linear.input.follows]
            assert scale is not None
            linear.input.set_qparams(scale, torch.zeros_like(scale, dtype=torch.int32))
        else:
            _set_input(linear, x, config)
        smoothed = weight_of(linear)
        _check_weight(f"{linear.name}, smoothed", smoothed)
        linear.weight.scale = _weight_scale(smoothed, linear.weight.spec, config)


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


def _set_input(linear: QuantizedLinear, x: Tensor, config: QuantConfig) -> None:
    granularity, spec, search = config.activations.granularity, linear.input.spec, config.range_search
    if granularity is Granularity.K_SCALED_CHANNEL:
        # where smoothing's vector is; x is rounded to whole numbers
        assert linear.smooth is not None
        steps = _statistics(x, 2).step_sizes(config.activations.clusters, spec, search, config.power_of_two)
        linear.smooth.copy_(steps.log())
        linear.input.set_qparams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        return
    if linear.smooth is not None:
        assert config.smoothing is not None
        scale = smoothing_scale(*_sizes(linear, x), config.smoothing)
        linear.smooth.copy_(scale.log())
        x = linear.smoothed(x)
    if linear.input.dynamic:
        return
    if linear.input.kept is not None and granularity is Granularity.PER_TENSOR:
        x = torch.cat((x[:, : linear.input.kept], x[:, linear.input.kept + 1 :]), 1)
    if not config.activations.symmetric:
        linear.input.set_qparams(*input_qparams(x, spec, granularity, search))
        return
    if granularity is Granularity.K_SCALED_TOKEN:
        scale = _statistics(x, 1).step_sizes(config.activations.clusters, spec, search, config.power_of_two)
    else:
        rows = x.transpose(0, 1).flatten(1) if granularity is Granularity.PER_TOKEN else x.reshape(1, -1)
        scale = symmetric_scale(rows, rows.abs().amax(1), spec, search)
    linear.input.set_qparams(scale, torch.zeros_like(scale, dtype=torch.int32))


def _statistics(x: Tensor, axis: int) -> Statistics:
    statistics = Statistics(axis)
    statistics.add(x)
    return statistics


def _weight_scale(weight: Tensor, spec: IntegerRange, config: QuantConfig) -> Tensor:
    """Step size (N,) of the rows of W (N, D), all of them equal with one scale per tensor."""
    if config.weights.granularity is WeightGranularity.PER_TENSOR:
        return weight_scale(weight.reshape(1, -1), spec, config.range_search).repeat(len(weight))
    return weight_scale(weight, spec, config.range_search)


def _channel_axis(convolution: QuantizedConvolution) -> int:
    return 1 if convolution.node.target is torch.ops.aten.conv2d.default else 2


@torch.no_grad()
def correct_biases(part: Part, members: Members, inputs: Values, seen: Seen) -> None:
    """b - E[x_q (W_q - W)] for all biases of a part: convolutions on the images that come to them, linears on what
    they saw."""
    _correct_convolutions(part, members, inputs)
    for linear in members.linears:
        correction = correction_of(members.gm, linear.name)
        if correction is None:
            continue
        weight, linear.input.mode = weight_of(linear), Mode.QUANTIZE
        pieces = [linear.input(linear.smoothed(x)).flatten(0, -2).double().sum(0) for x in seen.inputs[linear.input]]
        mean = torch.stack(pieces).sum(0) / sum(x[..., 0].numel() for x in seen.inputs[linear.input])
        linear.weight.mode = Mode.QUANTIZE
        correction.copy_((linear.weight(weight) - weight).double() @ -mean)


def _correct_convolutions(part: Part, members: Members, inputs: Values) -> None:
    """The mean of what each gives with its weight rounded, less that with its weight as it is."""
    outputs = {output.name: output.fake for output in members.outputs}
    some = {name: value[:CORRECTED_IMAGES] for name, value in inputs.items()}
    for convolution in members.convolutions:
        correction = correction_of(members.gm, convolution.name)
        if correction is None:
            continue
        output = outputs[convolution.name]
        means = []
        for mode in (Mode.QUANTIZE, Mode.PASS):
            members.set_mode(Mode.QUANTIZE)
            convolution.weight.mode = mode
            statistics = Statistics(_channel_axis(convolution))
            output.tap = statistics.add
            run_part(part, some)
            means.append(statistics.sum / statistics.count)
        output.tap = None
        correction.sub_(means[0] - means[1])


def _sizes(linear: QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """How large the channels of x and of W are: their maxima, which the steps grow with, but before a rotation their
    root mean squares: Σ|x_d / s_d|² · Σ|W_d · s_d|², which both errors then grow with, is least for s = |x| / |W|."""
    weight = weight_of(linear)
    if linear.rotated:
        return _root_mean_square(ops.rotate(x).flatten(0, 1)), _root_mean_square(ops.rotate(weight))
    return x.abs().amax((0, 1)), weight.abs().amax(0)


def _root_mean_square(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=0)
    if not torch.isfinite(norm).all():  # squares overflow float32 from 1e19 on
        norm = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).to(rows.dtype)
    return norm / len(rows) ** 0.5
