"""Prepares a model: captured, canonical, with smoothing and fake-quantizers that still do nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.config import Granularity, QuantConfig
from ptq4vm.graph.capture import capture
from ptq4vm.graph.class_token import class_tokens
from ptq4vm.graph.pipeline import Pipeline, finish
from ptq4vm.graph.sites import find_linears
from ptq4vm.metadata import LinearMetadata, QuantizationMetadata, architecture_of, set_metadata
from ptq4vm.passes.prepare.annotate import insert_fake_quantizers
from ptq4vm.passes.prepare.bias_correction import insert_corrections
from ptq4vm.passes.prepare.canonicalize import CANONICALIZE
from ptq4vm.passes.prepare.decompose import convolution_weights, expose_operators, output_sites, read_site, scan_sites
from ptq4vm.passes.prepare.reparameterize import insert_factors
from ptq4vm.passes.prepare.rotate import insert_rotation
from ptq4vm.passes.prepare.select import OutputSite, Sites, selected_linears
from ptq4vm.passes.prepare.smooth import insert_smoothing
from ptq4vm.passes.quantized import (
    quantized_linears,
)
from ptq4vm.serialization.content import portable


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
        LinearMetadata(name=site.name, tokens=site.tokens, in_features=site.in_features, out_features=site.out_features)
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
    gm = portable(insert_fake_quantizers(gm, config, sites), type(gm).__name__)
    for linear in quantized_linears(gm, [linear.name for linear in linears]):
        source = sources[linear.name]
        linear.input.follows = None if source is None else source.name
    shapes = tuple(tuple(value.shape[1:]) for value in example_inputs if isinstance(value, Tensor))
    metadata = QuantizationMetadata(
        config=config, linears=linears, input_shapes=shapes, architecture=architecture_of(model, shapes)
    )
    return set_metadata(gm, metadata)


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
    vector = config.smoothing is not None or config.granularity is Granularity.K_SCALED_CHANNEL
    return vector and source is None
