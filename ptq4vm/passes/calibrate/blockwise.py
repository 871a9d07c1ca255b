"""Calibrates a prepared graph block by block: collect, choose, correct and round, learn.

Two streams of activations run through the blocks: one in floating point, which statistics and targets come from, and
one through the blocks quantized so far. Only these two and one block's inputs are held in memory.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig
from ptq4vm.graph.partition import Block, NamedTensors, partition_blocks
from ptq4vm.passes.calibrate.block_quantizers import BlockQuantizers
from ptq4vm.passes.calibrate.callbacks import CalibrationCallback
from ptq4vm.passes.calibrate.choose_qparams import choose_qparams, collect
from ptq4vm.passes.calibrate.correct_and_round import correct_and_round
from ptq4vm.passes.calibrate.fisher import fisher_diagonal
from ptq4vm.passes.calibrate.learn_scales import block_loss, learn_block, residual_streams
from ptq4vm.passes.calibrate.resume import Finished, finished_blocks
from ptq4vm.passes.quantized_nodes import QuantizedLinear
from ptq4vm.quantization_specs import Loss
from ptq4vm.quantizers import Mode


@dataclass
class Streams:
    """The activations that the next blocks read, by name; one dictionary as long as nothing is quantized."""

    float_inputs: NamedTensors
    quantized_inputs: NamedTensors

    def advance(self, float_outputs: NamedTensors, quantized_outputs: NamedTensors, needed: set[str]) -> None:
        """Moves past a block; keeps what later blocks need."""
        same = quantized_outputs is float_outputs
        self.float_inputs = _keep(self.float_inputs | float_outputs, needed)
        self.quantized_inputs = self.float_inputs if same else _keep(self.quantized_inputs | quantized_outputs, needed)


def calibrate_blocks(
    prepared: GraphModule,
    images: NamedTensors,
    config: QuantConfig,
    resume_dir: Path | None,
    callback: CalibrationCallback,
) -> list[dict[str, Any]]:
    """Sets all qparams and smoothing vectors; returns one report a block: its linears and the losses of learning."""
    whole = BlockQuantizers.of(prepared, Block("model", prepared, (), ()))
    whole.reset()
    images = mirrored(images) if config.mirror else images
    blocks = partition_blocks(prepared, [site.node for site in whole.linears or whole.scans])
    per_block = [BlockQuantizers.of(prepared, block) for block in blocks]
    for parameter in prepared.parameters():
        parameter.requires_grad_(False)
    with finished_blocks(resume_dir, prepared, blocks, images, config) as finished, contextlib.ExitStack() as stack:
        stack.callback(callback.on_end)
        epochs = config.learning.epochs if config.learning else 1
        callback.on_start([quantizers.block.name for quantizers in per_block if quantizers], epochs)
        return _calibrate_all(per_block, images, config, finished, callback)


def _calibrate_all(
    per_block: Sequence[BlockQuantizers],
    images: NamedTensors,
    config: QuantConfig,
    finished: Finished,
    callback: CalibrationCallback,
) -> list[dict[str, Any]]:
    """Calibrates one block after another, or takes it from an earlier run."""
    blocks, reports, streams = [quantizers.block for quantizers in per_block], [], Streams(images, images)
    weighted = config.learning is not None and config.learning.loss is Loss.FISHER
    show = callback.on_fisher_batch
    diagonals = fisher_diagonal(blocks, images, config.seed, show) if weighted else [{} for _ in per_block]
    for index, (quantizers, fisher) in enumerate(zip(per_block, diagonals, strict=True)):
        needed = {name for later in blocks[index + 1 :] for name in later.inputs}
        if not quantizers:
            _pass_on(quantizers, streams, needed)
            continue
        callback.on_block_start(quantizers.block.name)
        stored = finished.read(index)
        if stored is None:
            targets, report = calibrate_block(quantizers, streams, config, config.seed + index, fisher, callback)
        else:
            targets, report = quantizers.restore(stored[0], streams.float_inputs), stored[1]
        outputs = quantizers.run(streams.quantized_inputs, Mode.QUANTIZE)
        if stored is None:
            _check_outputs(quantizers.block, outputs)
            report["cosine_loss"] = _stream_loss(outputs, targets, quantizers.linears)
            finished.write(index, quantizers.state(), report)
        streams.advance(targets, outputs, needed)
        reports.append(report)
        callback.on_block_end(quantizers.block.name, report)
    return reports


def calibrate_block(
    quantizers: BlockQuantizers,
    streams: Streams,
    config: QuantConfig,
    seed: int,
    fisher: NamedTensors,
    callback: CalibrationCallback,
) -> tuple[NamedTensors, dict[str, Any]]:
    """Collects, chooses, corrects and rounds, learns; returns the outputs in floating point and the block's report."""
    block, linears, inputs = quantizers.block, quantizers.linears, streams.quantized_inputs
    targets = collect(quantizers, streams.float_inputs, config)
    choose_qparams(quantizers, config)
    _check_outputs(block, targets)
    correct_and_round(quantizers, inputs, config)
    quantizers.forget()
    quantizers.set_mode(Mode.QUANTIZE)
    show = functools.partial(callback.on_epoch, block.name)
    losses = learn_block(block, linears, inputs, targets, config.learning, seed, show, fisher)
    report: dict[str, Any] = {"block": block.name, "linears": [linear.name for linear in linears]}
    return targets, report | ({} if losses is None else {"loss_before": losses[0], "loss_after": losses[1]})


def _pass_on(quantizers: BlockQuantizers, streams: Streams, needed: set[str]) -> None:
    """Runs a block without quantizers, once where both streams are one."""
    same, outputs = streams.quantized_inputs is streams.float_inputs, quantizers.run(streams.float_inputs, Mode.PASS)
    streams.advance(outputs, outputs if same else quantizers.run(streams.quantized_inputs, Mode.PASS), needed)


def mirrored(images: NamedTensors) -> NamedTensors:
    """Returns each image (B, C, H, W), followed by its mirror image."""
    for name, value in images.items():
        if value.dim() != 4:
            raise ValueError(
                f"mirror=True is for images (B, C, H, W), but the input {name!r} has the shape {tuple(value.shape)}; "
                "calibrate with mirror=False"
            )
    return {name: torch.stack((value, value.flip(-1)), 1).flatten(0, 1) for name, value in images.items()}


@torch.no_grad()
def _stream_loss(outputs: NamedTensors, targets: NamedTensors, linears: Sequence[QuantizedLinear]) -> float:
    """Returns 1 - cosine similarity of the residual stream after a block, mean over tokens."""
    last = [name for name, value in outputs.items() if value.is_floating_point()][-1:]
    channels = len(linears[-1].weight.calculate_qparams()[0]) if linears else 0
    return block_loss(residual_streams(outputs, last), residual_streams(targets, last), channels).item()


def _keep(values: NamedTensors, names: set[str]) -> NamedTensors:
    return {name: value for name, value in values.items() if name in names}


def _check_outputs(block: Block, outputs: NamedTensors) -> None:
    for name, value in outputs.items():
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).reshape(len(value), -1).any(1).sum())
            raise ValueError(
                f"{block.name}: its output {name} has values that are not finite for {bad} of {len(value)} calibration "
                "images; check the checkpoint and the images"
            )
