"""The lowering pipelines: from a calibrated graph to Q/DQ nodes, to integers, to fused operators."""

import copy
import dataclasses
import warnings

import torch
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig
from ptq4vm.graph.pipeline import Pass, Pipeline
from ptq4vm.graph.verify import GraphStage
from ptq4vm.metadata import Stage, metadata_of, set_metadata
from ptq4vm.passes.lower.bfloat16 import use_bfloat16_activations
from ptq4vm.passes.lower.fold import FoldConstants, drop_unused_tensors
from ptq4vm.passes.lower.fuse import FUSE
from ptq4vm.passes.lower.lower import lower
from ptq4vm.passes.prepare.annotate import insert_integers
from ptq4vm.passes.prepare.bias_correction import CORRECTION
from ptq4vm.passes.prepare.reparameterize import B_FACTOR, C_FACTOR
from ptq4vm.passes.prepare.smooth import fold_smoothing
from ptq4vm.serialization.model_file import portable


def lowering_pipeline(config: QuantConfig, *, integers: bool = True) -> Pipeline:
    """Returns the passes from a calibrated graph to integer operators, or to Q/DQ nodes without `integers`.

    >>> print(lowering_pipeline(QuantConfig.w8a8()))
    lowered
      qdq
        insert_integers
        fold_smoothing
      lower
    """
    passes: list[Pass] = [insert_integers, fold_smoothing]
    if config.bias_correction or config.state is not None:
        # calibration has multiplied weights by factors and added to biases
        passes += [FoldConstants((B_FACTOR, C_FACTOR, CORRECTION))]
    qdq = Pipeline(GraphStage.QDQ, tuple(passes))
    return Pipeline(GraphStage.LOWERED, (qdq, lower)) if integers else qdq


def fusing_pipeline(activations: torch.dtype = torch.float32) -> Pipeline:
    """Returns the passes from a lowered graph to fused operators.

    With `activations=torch.bfloat16` the activations between fused operators take half the memory and lose precision:
    then codes differ from the unfused graph's wherever a rounding to bfloat16 crosses their border. Raises ValueError
    for any other type than these two.
    """
    if activations not in (torch.float32, torch.bfloat16):
        raise ValueError(f"activations are torch.float32 or torch.bfloat16, got {activations}")
    half = (use_bfloat16_activations, drop_unused_tensors) if activations is torch.bfloat16 else ()
    return Pipeline(GraphStage.FUSED, (*FUSE, *half))


def converted_graph(prepared: GraphModule, pipeline: Pipeline) -> GraphModule:
    """Returns a copy of `prepared` after a pipeline that makes it a converted graph."""
    with warnings.catch_warnings():
        # torch 2.11 warns about its own classes when a graph is copied
        warnings.simplefilter("ignore", FutureWarning)
        made = pipeline(copy.deepcopy(prepared))
    gm = portable(made, type(prepared).__name__).eval()
    for parameter in gm.parameters():
        parameter.requires_grad_(False)
    return set_metadata(gm, dataclasses.replace(metadata_of(prepared), stage=Stage.CONVERTED))
