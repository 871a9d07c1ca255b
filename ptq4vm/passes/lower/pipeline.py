"""Converts a calibrated graph: Q/DQ graph, then integer graph."""

from __future__ import annotations

import copy
import dataclasses
import warnings

from torch.fx import GraphModule

from ptq4vm.graph.pipeline import Pipeline
from ptq4vm.metadata import Stage, metadata_of, set_metadata
from ptq4vm.passes.lower.fold import fold_constants
from ptq4vm.passes.lower.lower import lower
from ptq4vm.passes.prepare.annotate import insert_integers
from ptq4vm.passes.prepare.bias_correction import CORRECTION
from ptq4vm.passes.prepare.reparameterize import B_FACTOR, C_FACTOR
from ptq4vm.passes.prepare.smooth import fold_smoothing
from ptq4vm.serialization.content import portable


def _fold_found(gm: GraphModule) -> GraphModule:
    """What calibration has multiplied weights by and added to biases is in them from here on."""
    return fold_constants(gm, (B_FACTOR, C_FACTOR, CORRECTION))


BEFORE_LOWERING = Pipeline((insert_integers, fold_smoothing, _fold_found))


LOWERED = Pipeline((BEFORE_LOWERING, lower))


def converted_graph(prepared: GraphModule, passes: Pipeline) -> GraphModule:
    """A copy of `prepared` after some passes that make it a converted graph."""
    with warnings.catch_warnings():
        # torch 2.11 warns about its own classes when a graph is copied
        warnings.simplefilter("ignore", FutureWarning)
        made = passes(copy.deepcopy(prepared))
    gm = portable(made, type(prepared).__name__).eval()
    for parameter in gm.parameters():
        parameter.requires_grad_(False)
    return set_metadata(gm, dataclasses.replace(metadata_of(prepared), stage=Stage.CONVERTED))
