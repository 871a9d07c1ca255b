"""The road as passes in a row: captured model → prepared graph → Q/DQ graph → integer graph."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule

from ptq4vm.config import Granularity, QuantConfig
from ptq4vm.graph import Pipeline, capture, finish
from ptq4vm.passes.canonicalize import CANONICALIZE
from ptq4vm.passes.lower import lower
from ptq4vm.passes.rotate import insert_rotation
from ptq4vm.passes.smooth import fold_smoothing, insert_smoothing
from ptq4vm.quantizer import (
    insert_fake_quantizers,
    insert_integers,
    quantized_linears,
    selected_linears,
)
from ptq4vm.record import LinearRecord, Record, Stage, architecture_of, record_of, set_record

BEFORE_LOWERING = Pipeline((insert_integers, fold_smoothing))
LOWERED = Pipeline((BEFORE_LOWERING, lower))


def prepared_graph(model: nn.Module, example_inputs: tuple[Any, ...], config: QuantConfig) -> GraphModule:
    """Captured, canonical, with smoothing and fake-quantizers that still do nothing."""
    return prepared_from(canonical_graph(model, example_inputs), model, example_inputs, config)


def canonical_graph(model: nn.Module, example_inputs: tuple[Any, ...]) -> GraphModule:
    """The captured model, its products of weights written as linears: what every config begins with."""
    return Pipeline(CANONICALIZE)(capture(model, example_inputs))


def prepared_from(
    gm: GraphModule, model: nn.Module, example_inputs: tuple[Any, ...], config: QuantConfig
) -> GraphModule:
    """`prepared_graph` from the canonical graph of `model`, which is changed in place."""
    sites = selected_linears(gm, config)
    linears = tuple(
        LinearRecord(name=site.name, tokens=site.tokens, in_features=site.in_features, out_features=site.out_features)
        for site in sites
    )
    if config.smoothing is not None:
        gm = finish(insert_smoothing(gm, sites))
    if config.rotation:
        gm = finish(insert_rotation(gm, sites))
    gm = insert_fake_quantizers(gm, config, sites)
    for linear in quantized_linears(gm, [linear.name for linear in linears]):
        linear.weight.name = linear.name
        linear.input.name = linear.input.name or linear.name  # one input may feed several linears
    shapes = tuple(tuple(value.shape[1:]) for value in example_inputs if isinstance(value, Tensor))
    record = Record(config=config, linears=linears, input_shapes=shapes, architecture=architecture_of(model, shapes))
    return set_record(gm, record)


def converted_graph(prepared: GraphModule, passes: Pipeline) -> GraphModule:
    """A copy of `prepared` after some passes that make it a converted graph."""
    with warnings.catch_warnings():
        # torch 2.11 warns about its own classes when a graph is copied
        warnings.simplefilter("ignore", FutureWarning)
        made = passes(copy.deepcopy(prepared))
    gm = fx.GraphModule(made, made.graph, type(prepared).__name__)
    gm.meta.update(made.meta)
    for parameter in gm.parameters():
        parameter.requires_grad_(False)
    return set_record(gm, dataclasses.replace(record_of(prepared), stage=Stage.CONVERTED))


def skeleton(model: nn.Module, example_inputs: tuple[Any, ...], config: QuantConfig) -> GraphModule:
    """The lowered graph of a model with scales of one: the structure into which saved tensors are loaded."""
    prepared = prepared_graph(model, example_inputs, config)
    facts = record_of(prepared).linears
    for linear, fact in zip(quantized_linears(prepared, [f.name for f in facts]), facts, strict=True):
        if not linear.input.dynamic:
            count = fact.tokens if config.granularity is Granularity.PER_TOKEN else 1
            linear.input.set_qparams(torch.ones(count), torch.zeros(count, dtype=torch.int32))
        linear.weight.scale = torch.ones(fact.out_features)
    return converted_graph(prepared, LOWERED)
