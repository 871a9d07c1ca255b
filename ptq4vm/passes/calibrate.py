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

from ptq4vm import ops
from ptq4vm.config import Loss, QuantConfig
from ptq4vm.fake_quantize import Mode
from ptq4vm.files import replace_file
from ptq4vm.passes.cut import Part, cut
from ptq4vm.passes.gptq import Moments, best_ridge, compensated_weight, gptq_codes
from ptq4vm.passes.importance import importance
from ptq4vm.passes.learn import Values, block_loss, learn_block, streams, weight_of
from ptq4vm.passes.search import input_qparams, weight_scale
from ptq4vm.passes.smooth import smoothing_scale
from ptq4vm.quantizer import QuantizedLinear, Seen, tap_inputs

FORWARD_BATCH = 32
"""Images that run through a block at once when nothing is learned."""


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
    for linear in linears:
        _reset(linear)
    images = mirrored(images) if config.mirror else images
    parts = cut(prepared, [linear.node for linear in linears])
    saved = _Saved.open(resume_dir, prepared, images, config)
    exact, rounded, reports = images, images, []
    for parameter in prepared.parameters():
        parameter.requires_grad_(False)
    weighted = config.learning is not None and config.learning.loss is Loss.FISHER
    weights = importance(parts, images, config.seed, progress) if weighted else [{}] * len(parts)
    epochs = config.learning.epochs if config.learning else 1
    inside = [_linears_of(part, linears) for part in parts]
    total = epochs * sum(1 for members in inside if members)
    with tqdm(total=total, desc="calibrate", unit="epoch", disable=not progress) as bar:
        for index, (part, members) in enumerate(zip(parts, inside, strict=True)):
            bar.set_postfix(block=part.name)
            seen: Seen = tap_inputs(members) if saved.missing(index) else {}
            targets = _run(part, exact, members, Mode.PASS)
            if members:
                stored = saved.read(index)
                if stored is None:
                    _set_ranges(members, seen, config)
                else:
                    _restore(members, stored[0])
                    bar.update(epochs)
                for linear in members:
                    linear.input.tap = None
                    linear.input.mode = linear.weight.mode = Mode.QUANTIZE
                report: dict[str, Any] = {"block": part.name, "linears": [linear.name for linear in members]}
                if stored is None and config.gptq:
                    _round_weights(part, members, seen, rounded)
                if stored is None and config.learning is not None:
                    seed, show = config.seed + index, _reporter(bar, part.name)
                    losses = learn_block(part, members, rounded, targets, config.learning, seed, show, weights[index])
                    if losses is None:
                        bar.update(epochs)
                    else:
                        report |= {"loss_before": losses[0], "loss_after": losses[1]}
                elif stored is None:
                    bar.update()
                seen.clear()
            same = rounded is exact and not members
            rounded_next = targets if same else _run(part, rounded, members, Mode.QUANTIZE)
            if members:
                report["cosine_loss"] = _stream_loss(rounded_next, targets, members)
                reports.append(report if stored is None else stored[1])
                saved.write(index, members, reports[-1])
            needed = {name for later in parts[index + 1 :] for name in later.inputs}
            exact = _keep(exact | targets, needed)
            rounded = exact if same else _keep(rounded | rounded_next, needed)
    return reports


@torch.no_grad()
def _stream_loss(outputs: Values, targets: Values, members: Sequence[QuantizedLinear]) -> float:
    """1 - cosine similarity of the residual stream after a block, mean over tokens."""
    last, channels = list(outputs)[-1:], len(members[-1].weight.calculate_qparams()[0])
    return block_loss(streams(outputs, last), streams(targets, last), channels).item()


def _reporter(bar: Any, name: str) -> Callable[[int, float], None]:
    def report(epoch: int, loss: float) -> None:
        bar.set_postfix(block=name, epoch=epoch + 1, loss=f"{loss:.3e}")
        bar.update()

    return report


def _keep(values: Values, names: set[str]) -> Values:
    return {name: value for name, value in values.items() if name in names}


def _reset(linear: QuantizedLinear) -> None:
    linear.input.mode = linear.weight.mode = Mode.PASS
    linear.input.tap = None
    linear.input.scale = linear.input.zero_point = linear.weight.scale = None
    linear.input.log_factor = linear.weight.log_factor = None
    linear.weight.codes = None
    if linear.smooth is not None:
        linear.smooth.data.zero_()


def _linears_of(part: Part, linears: Sequence[QuantizedLinear]) -> list[QuantizedLinear]:
    used = set(part.module.modules())
    return [linear for linear in linears if linear.weight in used]


@torch.no_grad()
def _run(part: Part, values: Values, members: Sequence[QuantizedLinear], mode: Mode) -> Values:
    for linear in members:
        linear.input.mode = linear.weight.mode = mode
    images = len(next(iter(values.values())))
    pieces = [
        part({name: values[name][start : start + FORWARD_BATCH] for name in part.inputs})
        for start in range(0, images, FORWARD_BATCH)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in part.outputs}


@torch.no_grad()
def _set_ranges(members: Sequence[QuantizedLinear], seen: Seen, config: QuantConfig) -> None:
    for linear in members:
        x = torch.cat(seen[linear.input]).float()
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
            raise ValueError(
                f"{linear.name}: its input has values that are not finite for {bad} of {len(x)} calibration images; "
                "check the checkpoint and the images, or exclude the layer"
            )
        if linear.smooth is not None:
            assert config.smoothing is not None
            scale = smoothing_scale(*_sizes(linear, x), config.smoothing)
            linear.smooth.data.copy_(scale.log())
            x = linear.smoothed(x)
        if not linear.input.dynamic:
            linear.input.set_qparams(*input_qparams(x, linear.input.spec, config.granularity, config.range_search))
        linear.weight.scale = weight_scale(weight_of(linear), linear.weight.spec, config.range_search)


def _sizes(linear: QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """How large the channels of x and of W are: their maxima, which the steps grow with, but before a rotation their
    root mean squares: Σ|x_d / s_d|² · Σ|W_d · s_d|², which both errors then grow with, is least for s = |x| / |W|."""
    weight = weight_of(linear)
    if linear.rotated:
        return _root_mean_square(ops.rotate(x).flatten(0, 1)), _root_mean_square(ops.rotate(weight))
    return x.abs().amax((0, 1)), weight.abs().amax(0)


def _root_mean_square(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=0) / len(rows) ** 0.5


@torch.no_grad()
def _round_weights(part: Part, members: Sequence[QuantizedLinear], seen: Seen, rounded: Values) -> None:
    """GPTQ, one linear after another: each for the inputs that those before it, already rounded so, give it."""
    for linear in members:
        weight, pieces = weight_of(linear), iter(seen[linear.input])
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


def _tensors(linear: QuantizedLinear) -> dict[str, Tensor]:
    found = {
        "input_scale": linear.input.scale,
        "input_zero_point": linear.input.zero_point,
        "weight_scale": linear.weight.scale,
        "weight_codes": linear.weight.codes,
        "log_smooth": linear.smooth,
    }
    return {f"{linear.name}.{key}": value.detach() for key, value in found.items() if value is not None}


def _restore(members: Sequence[QuantizedLinear], stored: Values) -> None:
    for linear in members:
        linear.weight.scale = stored[f"{linear.name}.weight_scale"]
        if not linear.input.dynamic:
            linear.input.set_qparams(stored[f"{linear.name}.input_scale"], stored[f"{linear.name}.input_zero_point"])
        linear.weight.codes = stored.get(f"{linear.name}.weight_codes")
        if linear.smooth is not None:
            linear.smooth.data.copy_(stored[f"{linear.name}.log_smooth"])


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

    def write(self, index: int, members: Sequence[QuantizedLinear], report: dict[str, Any]) -> None:
        if self.folder is not None and self.missing(index):
            tensors = {name: value for linear in members for name, value in _tensors(linear).items()}
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
