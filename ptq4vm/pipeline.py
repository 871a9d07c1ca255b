"""The road as passes in a row: captured model → prepared graph → Q/DQ graph → integer graph."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig
from ptq4vm.graph import Pipeline, capture, find_linears, finish
from ptq4vm.passes.canonicalize import CANONICALIZE
from ptq4vm.passes.class_token import class_tokens
from ptq4vm.passes.correct import CORRECTION, insert_corrections
from ptq4vm.passes.expose import convolution_weights, expose_operators, output_sites, read_site, scan_sites
from ptq4vm.passes.fold import fold_constants
from ptq4vm.passes.lower import lower
from ptq4vm.passes.reparameterize import B_FACTOR, C_FACTOR, insert_factors
from ptq4vm.passes.rotate import insert_rotation
from ptq4vm.passes.smooth import fold_smoothing, insert_smoothing
from ptq4vm.quantizer import (
    OutputSite,
    Sites,
    convolution_weight,
    insert_fake_quantizers,
    insert_integers,
    quantized_convolutions,
    quantized_linears,
    quantized_outputs,
    quantized_scans,
    selected_linears,
)
from ptq4vm.record import LinearRecord, Record, Stage, architecture_of, record_of, set_record
from ptq4vm.serialize import PortableGraph
from ptq4vm.specs import Granularity


def _fold_found(gm: GraphModule) -> GraphModule:
    """What calibration has multiplied weights by and added to biases is in them from here on."""
    return fold_constants(gm, (B_FACTOR, C_FACTOR, CORRECTION))


BEFORE_LOWERING = Pipeline((insert_integers, fold_smoothing, _fold_found))
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
    if config.outputs is not None:
        gm = finish(expose_operators(gm))
    sites = find_sites(gm, config)
    linears = tuple(
        LinearRecord(name=site.name, tokens=site.tokens, in_features=site.in_features, out_features=site.out_features)
        for site in sites.linears
    )
    sources = {linear.name: read_site(linear, sites.outputs) for linear in sites.linears}
    if config.state is not None and config.state.factors is not None:
        gm = finish(insert_factors(gm, sites.scans, find_linears(gm), config.state.integrate))
    gm = finish(
        insert_smoothing(gm, [linear for linear in sites.linears if _is_smoothed(config, sources[linear.name])])
    )
    if config.rotation:
        gm = finish(insert_rotation(gm, sites.linears))
    if config.bias_correction:
        gm = finish(insert_corrections(gm, sites))
    gm = _portable(insert_fake_quantizers(gm, config, sites), type(gm).__name__)
    for linear in quantized_linears(gm, [linear.name for linear in linears]):
        source = sources[linear.name]
        linear.input.follows = None if source is None else source.name
    shapes = tuple(tuple(value.shape[1:]) for value in example_inputs if isinstance(value, Tensor))
    record = Record(config=config, linears=linears, input_shapes=shapes, architecture=architecture_of(model, shapes))
    return set_record(gm, record)


def find_sites(gm: GraphModule, config: QuantConfig) -> Sites:
    """What the config quantizes in a canonical graph, its operators exposed where outputs are quantized."""
    linears = selected_linears(gm, config)
    return Sites(
        linears=linears,
        class_tokens=class_tokens(gm, linears) if config.class_token_in_float else {},
        outputs=output_sites(gm, linears, config.outputs.k_scaled) if config.outputs else (),
        convolutions=convolution_weights(gm) if config.outputs else {},
        scans=scan_sites(gm) if config.state else (),
    )


def _is_smoothed(config: QuantConfig, source: OutputSite | None) -> bool:
    """Whether the channels of a linear's input are divided by a vector, that of smoothing or of step sizes."""
    vector = config.smoothing is not None or config.activations.granularity is Granularity.K_SCALED_CHANNEL
    return vector and source is None


def converted_graph(prepared: GraphModule, passes: Pipeline) -> GraphModule:
    """A copy of `prepared` after some passes that make it a converted graph."""
    with warnings.catch_warnings():
        # torch 2.11 warns about its own classes when a graph is copied
        warnings.simplefilter("ignore", FutureWarning)
        made = passes(copy.deepcopy(prepared))
    gm = _portable(made, type(prepared).__name__).eval()
    for parameter in gm.parameters():
        parameter.requires_grad_(False)
    return set_record(gm, dataclasses.replace(record_of(prepared), stage=Stage.CONVERTED))


def _portable(gm: GraphModule, name: str) -> GraphModule:
    """The same graph, which pickle and copy know how to treat."""
    made = PortableGraph(gm, gm.graph, name)
    made.meta.update(gm.meta)
    return made


def skeleton(model: nn.Module, example_inputs: tuple[Any, ...], config: QuantConfig) -> GraphModule:
    """The lowered graph of a model with scales of one: the structure into which saved tensors are loaded."""
    prepared = prepared_graph(model, example_inputs, config)
    facts = record_of(prepared).linears
    for linear, fact in zip(quantized_linears(prepared, [f.name for f in facts]), facts, strict=True):
        if not linear.input.dynamic:
            count = fact.tokens if linear.input.per_token else 1
            linear.input.set_qparams(torch.ones(count), torch.zeros(count, dtype=torch.int32))
        linear.weight.scale = torch.ones(fact.out_features)
    for output in quantized_outputs(prepared):
        single = output.fake.granularity is Granularity.PER_TENSOR
        output.fake.scale = torch.ones(1 if single else output.node.meta["val"].shape[output.fake.axis])
    for convolution in quantized_convolutions(prepared):
        convolution.weight.scale = torch.ones(len(convolution_weight(prepared, convolution)))
    for scan in quantized_scans(prepared):
        per_token = config.state is not None and (config.state.per_token or config.state.factors is not None)
        scan.fake.scale = torch.ones(scan.node.meta["val"].shape[1] if per_token else 1)
    return converted_graph(prepared, LOWERED)
