"""The verbs: prepare, calibrate, convert, and quantize, which is all three."""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig
from ptq4vm.formatting import coverage_line
from ptq4vm.graph.model_copy import copied_model, own_tensors
from ptq4vm.graph.verify import is_lowered
from ptq4vm.metadata import Stage, metadata_of, prepared_metadata, update_metadata
from ptq4vm.passes.calibrate.blockwise import calibrate_blocks
from ptq4vm.passes.calibrate.callbacks import CalibrationCallback, Callbacks, ProgressBar
from ptq4vm.passes.calibrate.collect import collect_inputs, has_length, select_inputs
from ptq4vm.passes.lower.pipeline import converted_graph, fusing_pipeline, lowering_pipeline
from ptq4vm.passes.prepare.pipeline import prepared_graph

_log = logging.getLogger("ptq4vm")

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
def prepare(
    model: nn.Module, example_inputs: tuple[Any, ...], config: QuantConfig | None = None, *, replace: bool = False
) -> GraphModule:
    """Captures a model and puts smoothing and fake-quantizers around its linears.

    Args:
        model: is copied, and captured in evaluation mode.
        example_inputs: the first axis of every tensor is the batch, which stays dynamic; all other sizes are fixed.
        config: `QuantConfig.w8a8()` if None.
        replace: for a model of its authors' code: capture the model of `ptq4vm.models` in its place that has the same
            tensors and the same outputs for the example. It fuses better. A warning in the log says which it is.

    Returns:
        A graph that computes what the model does, until it is calibrated. What it quantizes, and what it leaves and
        why, is in its metadata (`ptq4vm.metadata.metadata_of(prepared).coverage`), and logged in one line.

    Raises:
        ptq4vm.graph.capture.CaptureError: where torch.export cannot follow the model, or a block hands on a tensor that
            belongs to no image; it names the module, the line of the model's code and what to write instead.
        ValueError: where the config finds nothing to quantize or does not fit the model; where `replace` finds no such
            model, naming the closest.

    Example:
        >>> import torch, ptq4vm
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(2, 5, 8)
        >>> prepared = ptq4vm.prepare(model, (images,), ptq4vm.QuantConfig.minmax(8))
        >>> torch.equal(prepared(images), model(images))
        True
    """
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs must be a tuple of the model's inputs: write (images,)")
    if replace:
        from ptq4vm.models.replace import replacement  # imports timm

        model = replacement(copied_model(model), tuple(example_inputs))
    prepared = prepared_graph(model, tuple(example_inputs), config or QuantConfig.w8a8())
    _log.warning("%s: %s", type(model).__name__, coverage_line(metadata_of(prepared).coverage))
    return prepared


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

    Example:
        >>> import torch, ptq4vm
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(2, 5, 8)
        >>> prepared = ptq4vm.prepare(model, (images,), ptq4vm.QuantConfig.minmax(8))
        >>> prepared = ptq4vm.calibrate(prepared, [images], progress=False)
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
    images = collect_inputs(prepared, loader, max_images, ends, progress)
    update_metadata(prepared, stage=Stage.PREPARED, blocks=())
    folder = Path(resume_dir) if resume_dir is not None else None
    bar = (ProgressBar(),) if progress else ()
    blocks = calibrate_blocks(prepared, images, metadata.config, folder, Callbacks((*bar, *callbacks)))
    return update_metadata(prepared, stage=Stage.CALIBRATED, blocks=tuple(blocks))


@_with_gradients
def convert(prepared: GraphModule, *, lower: bool = True) -> GraphModule:
    """Converts a calibrated graph into one of integer linears.

    Args:
        prepared: stays as it is.
        lower: False keeps float linears between quantize and dequantize nodes, torchao's exchange form.

    Returns:
        A graph for inference, of any batch size; it refuses gradients.

    Raises:
        RuntimeError: before `calibrate` has run.

    Example:
        >>> import torch, ptq4vm
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(2, 5, 8)
        >>> prepared = ptq4vm.prepare(model, (images,), ptq4vm.QuantConfig.minmax(8))
        >>> quantized = ptq4vm.convert(ptq4vm.calibrate(prepared, [images], progress=False))
        >>> quantized.state_dict()["0.weight_q"].dtype
        torch.int8
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
    """Refuses inputs that require a gradient: rounding has the gradient zero, which nobody means who asks for one."""
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        raise RuntimeError(
            "a converted model has no gradients, and an input requires one: call it under torch.no_grad(), or take "
            "gradients of the prepared model"
        )


@_with_gradients
def fuse(quantized: GraphModule, *, activations: torch.dtype = torch.float32) -> GraphModule:
    """Copies a quantized model into one that runs faster: producers write codes, scans move no tokens.

    `torch.compile(quantized, backend="ptq4vm")` does the same and compiles the rest.

    Args:
        quantized: a lowered graph.
        activations: torch.bfloat16 halves the memory of activations between operators; faster still and less exact.

    Returns:
        A graph to be run and not saved: its weights lie in the layout of this package's kernels.
        `ptq4vm.passes.lower.fuse.fusions` lists what was fused, and what was left and why.

    Raises:
        ValueError: for a graph that is not lowered.

    Example:
        >>> import torch, ptq4vm
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(2, 5, 8)
        >>> quantized = ptq4vm.quantize(model, [images], ptq4vm.QuantConfig.minmax(8), progress=False)
        >>> torch.allclose(ptq4vm.fuse(quantized)(images), quantized(images), atol=1e-6)
        True
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
    replace: bool = False,
) -> GraphModule:
    """Prepares, calibrates and converts in one call; the first batch holds the example inputs.

    Args:
        model: its inputs are the arguments of its `forward` that have no default, or the first one.
        loader, max_images, resume_dir, progress, callbacks: as for `calibrate`.
        config: `QuantConfig.w8a8()` if None.
        replace: as for `prepare`.

    Returns:
        A graph of integer linears, as `convert` returns it.

    Raises:
        ValueError: for an empty loader; else as `prepare` and `calibrate` do.

    Example:
        >>> import torch, ptq4vm
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(2, 5, 8)
        >>> quantized = ptq4vm.quantize(model, [images], ptq4vm.QuantConfig.minmax(8), progress=False)
        >>> quantized(images).shape
        torch.Size([2, 5, 4])
    """
    if isinstance(loader, Tensor):
        raise TypeError("the loader must yield batches: for one tensor of images write [images]")
    batches = iter(loader)
    first = list(itertools.islice(batches, 1))
    if not first:
        raise ValueError("the calibration loader is empty; give it at least one image (the paper takes 256)")
    inputs = tuple(select_inputs(first[0], _input_names(model), "calibration batch 0"))
    prepared = prepare(model, inputs, config, replace=replace)
    items = itertools.chain(first, batches)
    return convert(_calibrate(prepared, items, has_length(loader), max_images, resume_dir, progress, callbacks))


def _input_names(model: nn.Module) -> Sequence[str]:
    """Returns the arguments of a model's `forward` without a default, or else the first one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [value for value in inspect.signature(model.forward).parameters.values() if value.kind in kinds]
    required = [value.name for value in names if value.default is inspect.Parameter.empty]
    return required or [value.name for value in names[:1]] or ["x"]
