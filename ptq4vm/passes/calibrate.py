"""Calibration, block by block: smoothing from statistics, range search, learning.

Two streams of activations run through the blocks: one in floating point, which gives the statistics and the targets,
and one through the blocks quantized so far. Only these two and one block's inputs are held in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

from ptq4vm.config import Loss, QuantConfig
from ptq4vm.fake_quantize import Mode
from ptq4vm.files import replace_file
from ptq4vm.passes.cut import Part, cut
from ptq4vm.passes.gptq import Moments, best_ridge, compensated_weight, gptq_codes
from ptq4vm.passes.importance import importance
from ptq4vm.passes.learn import Values, block_loss, learn_block, streams, weight_of
from ptq4vm.passes.members import Members, Seen, members_of, run_part
from ptq4vm.passes.ranges import correct_biases, set_ranges, set_states
from ptq4vm.quantizer import QuantizedLinear


def gather(loader: Iterable[Any], names: Sequence[str]) -> Values:
    """All calibration inputs, by placeholder. A loader's item is a tensor, or a tuple that begins with the inputs."""
    batches: list[tuple[Tensor, ...]] = []
    for item in loader:
        values = tuple(item) if isinstance(item, (tuple, list)) else (item,)
        values = values[: len(names)]
        if len(values) < len(names) or not all(isinstance(value, Tensor) for value in values):
            kinds = ", ".join(type(value).__name__ for value in values)
            raise ValueError(f"the model takes {len(names)} tensors ({', '.join(names)}); the loader gave ({kinds})")
        for name, value in zip(names, values, strict=True):
            if not torch.isfinite(value).all():
                raise ValueError(f"calibration batch {len(batches)}: input {name!r} has values that are not finite")
        batches.append(values)
    if not batches or not any(len(batch[0]) for batch in batches):
        raise ValueError("the calibration loader is empty; give it at least one image (the paper takes 256)")
    return {name: torch.cat([batch[i] for batch in batches]) for i, name in enumerate(names)}


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
    saved = _Saved.open(resume_dir, prepared, images, config)
    exact, rounded, reports, finished = images, images, [], 0
    for parameter in prepared.parameters():
        parameter.requires_grad_(False)
    weighted = config.learning is not None and config.learning.loss is Loss.FISHER
    weights = importance(parts, images, config.seed, progress) if weighted else [{}] * len(parts)
    epochs = config.learning.epochs if config.learning else 1
    inside = [whole.inside(part.module) for part in parts]
    with tqdm(total=epochs * sum(map(bool, inside)), desc="calibrate", unit="epoch", disable=not progress) as bar:
        for index, (part, members) in enumerate(zip(parts, inside, strict=True)):
            bar.set_postfix(block=part.name)
            stored = saved.read(index) if members else None
            if stored is not None:
                members.restore_states(stored[0])
            if members and stored is None:
                targets, seen = _observe(part, exact, members, config)
                set_ranges(whole, members, seen, config)
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
                report["cosine_loss"] = _stream_loss(rounded_next, targets, members.linears)
                reports.append(report)
                saved.write(index, members, report)
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
    last = list(outputs)[-1:]
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
        target = compensated_weight(weight, moments, best_ridge(weight, moments))
        linear.weight.codes = gptq_codes(target, step, linear.weight.spec, moments)


class _Saved:
    """Finished blocks on disk, bound to one model, config and set of images by a fingerprint."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path | None, prepared: GraphModule, images: Values, config: QuantConfig) -> _Saved:
        if folder is None:
            return cls(None)
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {"fingerprint": _fingerprint(prepared, images, config), "torch": torch.__version__}
        path = folder / "calibration.json"
        if path.exists() and _read_json(path) != manifest:
            raise ValueError(
                f"{folder} holds a calibration of another model, config, set of images or torch version; "
                "give resume_dir another folder or delete this one"
            )
        replace_file(path, lambda temporary: temporary.write_text(json.dumps(manifest)))
        return cls(folder)

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block_{index:03d}.safetensors"

    def missing(self, index: int) -> bool:
        return self.folder is None or not self._path(index).exists()

    def read(self, index: int) -> tuple[Values, dict[str, Any]] | None:
        """The tensors and the report of a finished block."""
        if self.missing(index):
            return None
        try:
            with safe_open(self._path(index), "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["report"])  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._path(index)} cannot be read ({error}); delete it and calibrate again") from error

    def write(self, index: int, members: Members, report: dict[str, Any]) -> None:
        if self.folder is not None and self.missing(index):
            tensors = {name: value.clone() for name, value in members.tensors().items()}  # some share memory
            metadata = {"report": json.dumps(report)}
            replace_file(self._path(index), lambda temporary: save_file(tensors, temporary, metadata))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} and calibrate again") from error


def _fingerprint(prepared: GraphModule, images: Values, config: QuantConfig) -> str:
    digest = hashlib.sha256(config.to_json().encode())
    tensors = {name: value for name, value in prepared.named_parameters() if not name.endswith(".log_smooth")}
    for name, value in sorted({**tensors, **images}.items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
