"""Calibration, block by block: smoothing from statistics, range search, learning.

Two streams of activations run through the blocks: one in floating point, which gives the statistics and the targets,
and one through the blocks quantized so far. Only these two and one block's inputs are held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from ptq4vm.config import QuantConfig
from ptq4vm.graph.partition import Part, cut
from ptq4vm.passes.calibrate.fisher import importance
from ptq4vm.passes.calibrate.gptq import Moments, best_ridge, compensated_weight, gptq_codes
from ptq4vm.passes.calibrate.jlss import Values, block_loss, learn_block, streams, weight_of
from ptq4vm.passes.calibrate.observers import Members, Seen, members_of, run_part
from ptq4vm.passes.calibrate.ranges import correct_biases, set_ranges, set_states
from ptq4vm.passes.calibrate.resume import Finished, finished_blocks
from ptq4vm.passes.quantized import QuantizedLinear
from ptq4vm.quantizers import Mode
from ptq4vm.specs import Loss


def mirrored(images: Values) -> Values:
    """Each image (B, C, H, W), followed by its mirror image."""
    for name, value in images.items():
        if value.dim() != 4:
            raise ValueError(
                f"mirror=True is for images (B, C, H, W), but the input {name!r} has the shape {tuple(value.shape)}; "
                "calibrate with mirror=False"
            )
    return {name: torch.stack((value, value.flip(-1)), 1).flatten(0, 1) for name, value in images.items()}


def calibrate_blocks(
    prepared: GraphModule,
    linears: Sequence[QuantizedLinear],
    images: Values,
    config: QuantConfig,
    resume_dir: Path | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Finds and sets all qparams and smoothing vectors; one report a block: its linears and the losses of learning."""
    whole = members_of(prepared, linears)
    whole.reset()
    images = mirrored(images) if config.mirror else images
    parts = cut(prepared, [linear.node for linear in linears] or [scan.node for scan in whole.scans])
    for parameter in prepared.parameters():
        parameter.requires_grad_(False)
    with finished_blocks(resume_dir, prepared, parts, images, config) as saved:
        weighted = config.learning is not None and config.learning.loss is Loss.FISHER
        weights = importance(parts, images, config.seed, progress) if weighted else [{}] * len(parts)
        return _calibrate_parts(whole, parts, images, weights, config, saved, progress)


def _calibrate_parts(
    whole: Members,
    parts: Sequence[Part],
    images: Values,
    weights: Sequence[Values],
    config: QuantConfig,
    saved: Finished,
    progress: bool,
) -> list[dict[str, Any]]:
    exact, rounded, reports, finished = images, images, [], 0
    device = next(iter(images.values())).device
    epochs = config.learning.epochs if config.learning else 1
    inside = [whole.inside(part.module) for part in parts]
    with tqdm(total=epochs * sum(map(bool, inside)), desc="calibrate", unit="epoch", disable=not progress) as bar:
        for index, (part, members) in enumerate(zip(parts, inside, strict=True)):
            bar.set_postfix(block=part.name)
            stored = saved.read(index, device) if members else None
            if stored is not None:
                members.restore_states(stored[0])
            if members and stored is None:
                targets, seen = _observe(part, exact, members, config)
                set_ranges(whole, members, seen, config)
                _check_outputs(part, targets)
                report: dict[str, Any] = {"block": part.name, "linears": [linear.name for linear in members.linears]}
                if config.bias_correction:
                    correct_biases(part, members, rounded, seen)
                if config.gptq:
                    _round_weights(part, members, seen, rounded)
                seen.clear()
                members.set_mode(Mode.QUANTIZE)
                if config.learning is not None and members.linears:
                    seed, show = config.seed + index, _reporter(bar, part.name)
                    learned = learn_block(
                        part, members.linears, rounded, targets, config.learning, seed, show, weights[index]
                    )
                    report |= {} if learned is None else {"loss_before": learned[0], "loss_after": learned[1]}
            else:
                targets = _run(part, exact, members, Mode.PASS)
            if stored is not None:
                members.restore(stored[0])
            finished += bool(members)
            bar.update(max(0, epochs * finished - bar.n))
            same = rounded is exact and not members
            rounded_next = targets if same else _run(part, rounded, members, Mode.QUANTIZE)
            if stored is not None:
                reports.append(stored[1])
            elif members:
                _check_outputs(part, rounded_next)
                report["cosine_loss"] = _stream_loss(rounded_next, targets, members.linears)
                reports.append(report)
                saved.write(index, members.tensors(), report)
            needed = {name for later in parts[index + 1 :] for name in later.inputs}
            exact = _keep(exact | targets, needed)
            rounded = exact if same else _keep(rounded | rounded_next, needed)
    return reports


def _run(part: Part, values: Values, members: Members, mode: Mode) -> Values:
    members.set_mode(mode)
    return run_part(part, values)


@torch.no_grad()
def _stream_loss(outputs: Values, targets: Values, members: Sequence[QuantizedLinear]) -> float:
    """1 - cosine similarity of the residual stream after a block, mean over tokens."""
    last = [name for name, value in outputs.items() if value.is_floating_point()][-1:]
    channels = len(members[-1].weight.calculate_qparams()[0]) if members else 0
    return block_loss(streams(outputs, last), streams(targets, last), channels).item()


def _reporter(bar: Any, name: str) -> Callable[[int, float], None]:
    def report(epoch: int, loss: float) -> None:
        bar.set_postfix(block=name, epoch=epoch + 1, loss=f"{loss:.3e}")
        bar.update()

    return report


def _keep(values: Values, names: set[str]) -> Values:
    return {name: value for name, value in values.items() if name in names}


def _observe(part: Part, values: Values, members: Members, config: QuantConfig) -> tuple[Values, Seen]:
    """The part's outputs in floating point, and what reaches its quantizers; states are scaled first, as they change
    what x_proj gives."""
    if members.scans:
        states = members.tap_states()
        _run(part, values, members, Mode.PASS)
        members.untap()
        set_states(members, states, config)
    seen = members.tap()
    outputs = _run(part, values, members, Mode.PASS)
    members.untap()
    return outputs, seen


def _check_outputs(part: Part, outputs: Values) -> None:
    for name, value in outputs.items():
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).reshape(len(value), -1).any(1).sum())
            raise ValueError(
                f"{part.name}: its output {name} has values that are not finite for {bad} of {len(value)} calibration "
                "images; check the checkpoint and the images"
            )


@torch.no_grad()
def _round_weights(part: Part, members: Members, seen: Seen, rounded: Values) -> None:
    """GPTQ, one linear after another: each for the inputs that those before it, already rounded so, give it."""
    for linear in members.linears:
        weight, pieces = weight_of(linear), iter(seen.inputs[linear.input])
        moments = Moments(weight.shape[1], weight.device)
        smoothed = linear.smoothed
        linear.input.tap = lambda x, moments=moments, pieces=pieces, smoothed=smoothed: moments.add(
            smoothed(next(pieces)), x
        )
        _run(part, rounded, members, Mode.QUANTIZE)
        linear.input.tap = None
        step = linear.weight.calculate_qparams()[0]
        try:
            target = compensated_weight(weight, moments, best_ridge(weight, moments))
            linear.weight.codes = gptq_codes(target, step, linear.weight.spec, moments)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise ValueError(
                f"{linear.name}: GPTQ cannot round its weight ({error}); check the checkpoint and the images, exclude "
                "the layer, or calibrate with gptq=False"
            ) from error
