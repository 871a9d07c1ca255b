"""JLSS: joint learning of smoothing scales and step sizes, one block at a time (PTQ4VM section 4.3, stage 3).

The loss is 1 - cosine similarity over channels, averaged over tokens, between the block's output in floating point
on floating-point inputs, and the quantized block's output on the outputs of the quantized blocks before it. Weights
are rounded again at every step with the scales of that step. Scales are learned as logarithms.

The channels of an output are those of the block's last quantized linear, in (B, D, H, W) as in (B, H, W, D). Earlier
published code takes the last axis of both: the width of an image, along which a map one pixel wide has no gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ptq4vm.config import Learning
from ptq4vm.graph import Part
from ptq4vm.graph import finish as finish_graph
from ptq4vm.passes.smooth import merge_smoothing
from ptq4vm.quantizer import QuantizedLinear

Values = dict[str, Tensor]


def block_loss(outputs: Values, targets: Values, channels: int) -> Tensor:
    """Mean over tokens of 1 - cos over channels, summed over the outputs that have a target.

    `channels` says which axis of an output holds the channels: the last one, or the second one of (B, D, H, W).
    """
    losses = [
        (1 - F.cosine_similarity(outputs[name], target, dim=_channel_axis(target, channels))).mean()
        for name, target in targets.items()
    ]
    return torch.stack(losses).sum()


def _channel_axis(output: Tensor, channels: int) -> int:
    """The last axis, unless only the second has as many entries as there are channels."""
    first = output.dim() > 1 and output.shape[1] == channels != output.shape[-1]
    return 1 if first else -1


def learnables(linears: Sequence[QuantizedLinear]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Starts learning; the step sizes' and the smoothing vectors' parameters, each once."""
    quantizers = dict.fromkeys(q for linear in linears for q in (linear.input, linear.weight))
    scales = [quantizer.start_learning() for quantizer in quantizers if quantizer.scale is not None]
    smooth = [linear.smooth for linear in linears if linear.smooth is not None]
    for parameter in smooth:
        parameter.requires_grad_(True)
    return scales, smooth


def finish(linears: Sequence[QuantizedLinear]) -> None:
    """Folds what was learned into the scales."""
    for quantizer in dict.fromkeys(q for linear in linears for q in (linear.input, linear.weight)):
        if quantizer.log_factor is not None:
            quantizer.finish_learning()
    for linear in linears:
        if linear.smooth is not None:
            linear.smooth.requires_grad_(False)
            linear.smooth.grad = None


def learn_block(
    part: Part,
    linears: Sequence[QuantizedLinear],
    inputs: Values,
    targets: Values,
    config: Learning,
    seed: int,
    report: Callable[[int, float], None],
) -> tuple[float, float]:
    """Learns in place; the loss over all images before and after. A block that got worse is put back.

    `report(epoch, loss)` is called after every epoch with its mean loss.
    """
    scales, smooth = learnables(linears)
    parameters = scales + smooth
    start = [parameter.detach().clone() for parameter in parameters]
    images = len(next(iter(targets.values())))
    steps = config.epochs * math.ceil(images / config.batch_size)
    groups: list[dict[str, Any]] = [
        {"params": params, "lr": rate}
        for params, rate in ((scales, config.scale_rate), (smooth, config.smooth_rate))
        if params
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    channels = len(linears[-1].weight.calculate_qparams()[0])
    part = _merged(part)
    # gradients tell which outputs the quantization changes
    one = part({name: value[:1] for name, value in inputs.items()})
    targets = {name: value for name, value in targets.items() if one[name].requires_grad}
    before = _total_loss(part, inputs, targets, config.batch_size, channels)
    for epoch in range(config.epochs):
        total = 0.0
        for chosen in torch.randperm(images, generator=generator).split(config.batch_size):
            outputs = part({name: value[chosen] for name, value in inputs.items()})
            loss = block_loss(outputs, {name: value[chosen] for name, value in targets.items()}, channels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        report(epoch, total / images)
    after = _total_loss(part, inputs, targets, config.batch_size, channels)
    if not after < before:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
        after = before
    finish(linears)
    return before, after


def _merged(part: Part) -> Part:
    """The same piece, whose fake-quantizers do the smoothing."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(part.module.graph, {}))
    return dataclasses.replace(part, module=finish_graph(merge_smoothing(fx.GraphModule(part.module, graph))))


@torch.no_grad()
def _total_loss(part: Part, inputs: Values, targets: Values, batch_size: int, channels: int) -> float:
    images = len(next(iter(targets.values())))
    total = 0.0
    for chosen in torch.arange(images).split(batch_size):
        outputs = part({name: value[chosen] for name, value in inputs.items()})
        loss = block_loss(outputs, {name: value[chosen] for name, value in targets.items()}, channels)
        total += loss.item() * len(chosen)
    return total / images
