"""The verbs: prepare, calibrate, convert, and quantize, which is all three."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig
from ptq4vm.graph.model_copy import own_tensors
from ptq4vm.graph.verify import is_lowered
from ptq4vm.metadata import Stage, prepared_metadata, update_metadata
from ptq4vm.passes.calibrate.blockwise import calibrate_blocks
from ptq4vm.passes.calibrate.callbacks import CalibrationCallback, Callbacks, ProgressBar
from ptq4vm.passes.calibrate.collect import collect_inputs, has_length, select_inputs
from ptq4vm.passes.lower.pipeline import converted_graph, fusing_pipeline, lowering_pipeline
from ptq4vm.passes.prepare.pipeline import prepared_graph
from ptq4vm.passes.quantized import quantized_linears

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _with_gradients(verb: Callable[_P, _R]) -> Callable[_P, _R]:
    """Returns the verb made independent of its caller's settings: no_grad, inference_mode, autocast."""

    @functools.wraps(verb)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            return verb(*args, **kwargs)

    return run


@_with_gradients
def prepare(model: nn.Module, example_inputs: tuple[Any, ...], config: QuantConfig | None = None) -> GraphModule:
    """Captures a model and puts smoothing and fake-quantizers around its linears.

    The first axis of every example tensor is the batch, which stays dynamic; all other sizes are fixed. The model is
    copied; until it is calibrated the result computes what the model does. The default config is `w8a8()`. Raises
    `ptq4vm.graph.capture.CaptureError` where torch.export cannot follow the model.
    """
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs must be a tuple of the model's inputs: write (images,)")
    return prepared_graph(model, tuple(example_inputs), config or QuantConfig.w8a8())


@_with_gradients
def calibrate(
    prepared: GraphModule,
    loader: Iterable[Any],
    *,
    max_images: int | None = None,
    resume_dir: str | Path | None = None,
    progress: bool = True,
    callbacks: Sequence[CalibrationCallback] = (),
) -> GraphModule:
    """Finds smoothing vectors, scales and zero points, block by block; then `prepared` simulates the quantized model.

    Args:
        prepared: a graph from `prepare`; changed in place.
        loader: yields batches, is read once, and may fill one buffer again and again. A batch is a tensor (images, …),
            a tuple or list that begins with the model's inputs, such as (images, labels), or a mapping or named tuple
            that holds them by argument name, such as {"pixel_values": images}. What else a batch holds is ignored.
            Shapes are those of the example inputs; batches may differ in size.
        max_images: takes so many images and stops. Without it a loader that has no length is refused past 4096.
        resume_dir: keeps every finished block in this folder: an interrupted run continues and ends with the same
            bytes. The folder is bound to the model, config, images, versions, kernels and number of threads.
        progress: shows progress bars.
        callbacks: objects that follow the calibration, block by block and epoch by epoch.

    Returns:
        `prepared`.

    Raises:
        ValueError: for a batch that does not fit, naming it; for values that are not finite, naming the layer; for a
            `resume_dir` of another run, naming what differs, or one that another process uses.
    """
    return _calibrate(prepared, loader, has_length(loader), max_images, resume_dir, progress, callbacks)


def _calibrate(
    prepared: GraphModule,
    loader: Iterable[Any],
    ends: bool,
    max_images: int | None,
    resume_dir: str | Path | None,
    progress: bool,
    callbacks: Sequence[CalibrationCallback],
) -> GraphModule:
    metadata = prepared_metadata(prepared)
    if isinstance(loader, Tensor):
        raise TypeError("the loader must yield batches: for one tensor of images write [images]")
    own_tensors(prepared)
    linears = quantized_linears(prepared)
    images = collect_inputs(prepared, loader, max_images, ends, progress)
    update_metadata(prepared, stage=Stage.PREPARED, blocks=())
    folder = Path(resume_dir) if resume_dir is not None else None
    bar = (ProgressBar(),) if progress else ()
    blocks = calibrate_blocks(prepared, linears, images, metadata.config, folder, Callbacks((*bar, *callbacks)))
    return update_metadata(prepared, stage=Stage.CALIBRATED, blocks=tuple(blocks))


@_with_gradients
def convert(prepared: GraphModule, *, lower: bool = True) -> GraphModule:
    """A graph of integer linears; with `lower=False` one of float linears between quantize and dequantize nodes.

    `prepared` stays as it is. Raises RuntimeError before `calibrate` has run.
    """
    metadata = prepared_metadata(prepared)
    if metadata.stage is not Stage.CALIBRATED:
        raise RuntimeError(
            "the model is not calibrated: call ptq4vm.calibrate(prepared, loader) before ptq4vm.convert(prepared)"
        )
    made = converted_graph(prepared, lowering_pipeline(metadata.config, integers=lower))
    if not lower:  # integer operators refuse gradients themselves
        made.register_forward_pre_hook(_refuse_gradients)
    return made


def _refuse_gradients(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Rounding has the gradient zero, which nobody means who asks for one."""
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        raise RuntimeError(
            "a converted model has no gradients, and an input requires one: call it under torch.no_grad(), or take "
            "gradients of the prepared model"
        )


@_with_gradients
def fuse(quantized: GraphModule, *, activations: torch.dtype = torch.float32) -> GraphModule:
    """A copy that runs faster: activations are quantized by what makes them, scans move no tokens.

    Its weights lie in the layout of this package's kernels, so it is run and not saved. `torch.compile(quantized,
    backend="ptq4vm")` does the same and compiles the rest. `ptq4vm.passes.lower.fuse.fusions` lists what was
    fused, and what was left and why. `activations=torch.bfloat16` is faster still and less exact. Raises ValueError
    for a graph that is not lowered.
    """
    if not is_lowered(quantized):
        raise ValueError("only lowered models are fused: call ptq4vm.convert(prepared) without lower=False")
    return converted_graph(quantized, fusing_pipeline(activations))


@_with_gradients
def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    config: QuantConfig | None = None,
    *,
    max_images: int | None = None,
    resume_dir: str | Path | None = None,
    progress: bool = True,
    callbacks: Sequence[CalibrationCallback] = (),
) -> GraphModule:
    """prepare, calibrate and convert in one call; the first batch holds the example inputs.

    The model's inputs are the arguments of its `forward` that have no default, or the first one. The rest is as for
    `calibrate`.
    """
    if isinstance(loader, Tensor):
        raise TypeError("the loader must yield batches: for one tensor of images write [images]")
    batches = iter(loader)
    first = list(itertools.islice(batches, 1))
    if not first:
        raise ValueError("the calibration loader is empty; give it at least one image (the paper takes 256)")
    prepared = prepare(model, tuple(select_inputs(first[0], _input_names(model), "calibration batch 0")), config)
    items = itertools.chain(first, batches)
    return convert(_calibrate(prepared, items, has_length(loader), max_images, resume_dir, progress, callbacks))


def _input_names(model: nn.Module) -> Sequence[str]:
    """The arguments of a model's `forward` without a default, or else the first one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [value for value in inspect.signature(model.forward).parameters.values() if value.kind in kinds]
    required = [value.name for value in names if value.default is inspect.Parameter.empty]
    return required or [value.name for value in names[:1]] or ["x"]
