"""The verbs: prepare, calibrate, convert, and quantize, which is all three."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig
from ptq4vm.graph import Pipeline
from ptq4vm.passes.calibrate import calibrate_blocks, gather
from ptq4vm.passes.fuse import fuse as fuse_producers
from ptq4vm.passes.lower import is_lowered
from ptq4vm.pipeline import BEFORE_LOWERING, LOWERED, converted_graph, prepared_graph
from ptq4vm.quantizer import quantized_linears
from ptq4vm.record import Stage, prepared_record, update_record


def prepare(model: nn.Module, example_inputs: tuple[Any, ...], config: QuantConfig | None = None) -> GraphModule:
    """Captures a model and puts smoothing and fake-quantizers around its linears.

    The first axis of every example tensor is the batch, which stays dynamic; all other sizes are fixed. The model is
    copied; until it is calibrated the result computes what the model does. The default config is `w8a8()`. Raises
    `ptq4vm.graph.CaptureError` where torch.export cannot follow the model.
    """
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs must be a tuple of the model's inputs: write (images,)")
    return prepared_graph(model, tuple(example_inputs), config or QuantConfig.w8a8())


def calibrate(
    prepared: GraphModule,
    loader: Iterable[Any],
    *,
    resume_dir: str | Path | None = None,
    progress: bool = True,
) -> GraphModule:
    """Finds smoothing vectors, scales and zero points, block by block; then `prepared` simulates the quantized model.

    `loader` yields batches of inputs, or (input, target) pairs; it is read once. With `resume_dir` every finished
    block is kept there: an interrupted run continues and ends with the same bytes. Returns `prepared`, changed in
    place. Raises ValueError for an empty loader and for values that are not finite, naming the layer.
    """
    record = prepared_record(prepared)
    linears = quantized_linears(prepared, [linear.name for linear in record.linears])
    images = gather(loader, [node.name for node in prepared.graph.find_nodes(op="placeholder")])
    update_record(prepared, stage=Stage.PREPARED, blocks=())
    folder = Path(resume_dir) if resume_dir is not None else None
    blocks = calibrate_blocks(prepared, linears, images, record.config, folder, progress)
    return update_record(prepared, stage=Stage.CALIBRATED, blocks=tuple(blocks))


def convert(prepared: GraphModule, *, lower: bool = True) -> GraphModule:
    """A graph of integer linears; with `lower=False` one of float linears between quantize and dequantize nodes.

    `prepared` stays as it is. Raises RuntimeError before `calibrate` has run.
    """
    if prepared_record(prepared).stage is not Stage.CALIBRATED:
        raise RuntimeError(
            "the model is not calibrated: call ptq4vm.calibrate(prepared, loader) before ptq4vm.convert(prepared)"
        )
    made = converted_graph(prepared, LOWERED if lower else BEFORE_LOWERING)
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


def fuse(quantized: GraphModule, *, activations: torch.dtype = torch.float32) -> GraphModule:
    """A copy that runs faster: activations are quantized by what makes them, scans move no tokens.

    Its weights lie in the layout of this package's kernels, so it is run and not saved. `torch.compile(quantized,
    backend="ptq4vm")` does the same and compiles the rest. What was fused, and what was left and why, is told by
    `ptq4vm.passes.fuse.fusions`. `activations=torch.bfloat16` is faster still and less exact. Raises ValueError for a
    graph that is not lowered.
    """
    if not is_lowered(quantized):
        raise ValueError("only lowered models are fused: call ptq4vm.convert(prepared) without lower=False")
    return converted_graph(quantized, Pipeline((lambda gm: fuse_producers(gm, activations),)))


def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    config: QuantConfig | None = None,
    *,
    resume_dir: str | Path | None = None,
    progress: bool = True,
) -> GraphModule:
    """prepare, calibrate and convert in one call, for a model of one input; the first batch is the example."""
    batches = list(loader)
    if not batches:
        raise ValueError("the calibration loader is empty; give it at least one image (the paper takes 256)")
    first = batches[0][0] if isinstance(batches[0], (tuple, list)) else batches[0]
    prepared = prepare(model, (first,), config)
    return convert(calibrate(prepared, batches, resume_dir=resume_dir, progress=progress))
