"""JLSS: joint learning of smoothing scales and quantizers' scales, one block at a time (PTQ4VM section 4.3, stage 3).

The target is the block's output in floating point on floating-point inputs; what comes near it is the quantized
block's output on the outputs of the quantized blocks before it. Weights are rounded again at every step with the
scales of that step, unless GPTQ has chosen their codes, which stay. Scales are learned as logarithms.

The channels of an output are those of the block's last quantized linear, in (B, D, H, W) as in (B, H, W, D). Earlier
published code takes the last axis of both: the width of an image, along which a map one pixel wide has no gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ptq4vm.config import matches
from ptq4vm.graph.partition import Block, NamedTensors
from ptq4vm.graph.pipeline import Pipeline
from ptq4vm.graph.verify import GraphStage
from ptq4vm.passes.prepare.smooth import merge_smoothing
from ptq4vm.passes.quantized_nodes import QuantizedLinear
from ptq4vm.quantization_specs import Learning, Loss


def block_loss(outputs: NamedTensors, targets: NamedTensors, channels: int) -> Tensor:
    """Returns the mean over tokens of 1 - cos over channels, summed over the outputs that have a target.

    `channels` says which axis of an output holds the channels: the last one, or the second one of (B, D, H, W).
    """
    losses = [
        (1 - F.cosine_similarity(outputs[name], target, dim=_channel_axis(target, channels))).mean()
        for name, target in targets.items()
    ]
    return torch.stack(losses).sum()


def weighted_error(outputs: NamedTensors, targets: NamedTensors, fisher: NamedTensors) -> Tensor:
    """Returns the squared error of outputs (images, …), weighted by the Fisher diagonal (…), over that of zeros."""
    losses = []
    for name, target in targets.items():
        error, whole = (value.square() * fisher[name] for value in (outputs[name] - target, target))
        losses.append(error.sum() / whole.sum().clamp(min=1e-12))
    return torch.stack(losses).sum()


def residual_streams(values: NamedTensors, targets: Sequence[str]) -> NamedTensors:
    """Returns the outputs that quantization changes, each with the others of its shape added.

    A block hands on its residual stream whole (VMamba), or as the mixer's output and the stream before it (Vim).
    """
    floats = [value for value in values.values() if value.is_floating_point()]
    return {
        name: sum((value for value in floats if value.shape == values[name].shape), torch.zeros(())) for name in targets
    }


def _channel_axis(output: Tensor, channels: int) -> int:
    """Returns the last axis, unless only the second has as many entries as there are channels."""
    first = output.dim() > 1 and output.shape[1] == channels != output.shape[-1]
    return 1 if first else -1


def learnables(linears: Sequence[QuantizedLinear], config: Learning) -> list[dict[str, Any]]:
    """Starts learning; returns an optimizer's groups of parameters, each parameter once."""
    inputs = list(dict.fromkeys(linear.input for linear in linears if linear.input.scale is not None))
    scales = [quantizer.start_learning() for quantizer in (*inputs, *(linear.weight for linear in linears))]
    smooth = [linear.smooth for linear in linears if linear.smooth is not None]
    for parameter in smooth:
        parameter.requires_grad_(True)
    groups = ((scales, config.scale_rate), (smooth, config.smooth_rate))
    return [{"params": params, "lr": rate} for params, rate in groups if params]


def fold_learned_scales(linears: Sequence[QuantizedLinear]) -> None:
    """Folds what was learned into the scales."""
    for quantizer in dict.fromkeys(q for linear in linears for q in (linear.input, linear.weight)):
        if quantizer.log_factor is not None:
            quantizer.fold_learned_scale()
    for linear in linears:
        if linear.smooth is not None:
            linear.smooth.requires_grad_(False)
            linear.smooth.grad = None


def learn_block(
    block: Block,
    linears: Sequence[QuantizedLinear],
    inputs: NamedTensors,
    targets: NamedTensors,
    config: Learning | None,
    seed: int,
    report: Callable[[int, float], None],
    fisher: NamedTensors,
) -> tuple[float, float] | None:
    """Learns in place; returns the loss over all images before and after. A block that got worse is put back.

    `report(epoch, loss)` is called after every epoch with its mean loss. Returns None where nothing learns.
    `fisher` is the diagonal for the outputs' entries, which `Loss.FISHER` alone reads; without it all count alike.
    """
    if config is None:
        return None
    chosen = [linear for linear in linears if not config.only or matches(linear.name, config.only)]
    if not chosen:
        return None
    channels = len(linears[-1].weight.calculate_qparams()[0])
    groups = learnables(chosen, config)
    images = len(next(iter(targets.values())))
    merged = _merged(block)
    # gradients tell which outputs the quantization changes
    one = merged({name: value[:1] for name, value in inputs.items()})
    changed = [name for name in targets if one[name].requires_grad]
    if not changed:
        fold_learned_scales(chosen)
        return None
    matter = [name for name in changed if name in fisher]
    weights = fisher if matter else {name: torch.ones_like(targets[name][0]) for name in changed}

    def loss_of(batch: Tensor) -> Tensor:
        outputs = merged({name: value[batch] for name, value in inputs.items()})
        wanted = {name: value[batch] for name, value in targets.items()}
        if config.loss is Loss.FISHER:
            names = matter or changed
            return weighted_error(residual_streams(outputs, names), residual_streams(wanted, names), weights)
        return block_loss(outputs, {name: wanted[name] for name in changed}, channels)

    before, after = _descend(loss_of, groups, images, config, seed, report)
    fold_learned_scales(chosen)
    return before, after


def _descend(
    loss_of: Callable[[Tensor], Tensor],
    groups: Sequence[dict[str, Any]],
    images: int,
    config: Learning,
    seed: int,
    report: Callable[[int, float], None],
) -> tuple[float, float]:
    """Runs Adam on batches of image indices with rates falling along a cosine; returns the loss before and after.

    What got worse is put back.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    start = [parameter.detach().clone() for parameter in parameters]
    before = _mean_loss(loss_of, images, config.batch_size)
    optimizer = torch.optim.Adam(groups)
    steps = config.epochs * math.ceil(images / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(config.epochs):
        total = 0.0
        for batch in torch.randperm(images, generator=generator).split(config.batch_size):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        report(epoch, total / images)
    after = _mean_loss(loss_of, images, config.batch_size)
    if not after < before:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
        after = before
    return before, after


@torch.no_grad()
def _mean_loss(loss_of: Callable[[Tensor], Tensor], images: int, batch_size: int) -> float:
    return sum(loss_of(batch).item() * len(batch) for batch in torch.arange(images).split(batch_size)) / images


def _merged(block: Block) -> Block:
    """Returns the same block, whose fake-quantizers do the smoothing."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(block.module.graph, {}))
    merge = Pipeline(GraphStage.PREPARED, (merge_smoothing,))
    return dataclasses.replace(block, module=merge(fx.GraphModule(block.module, graph)))
