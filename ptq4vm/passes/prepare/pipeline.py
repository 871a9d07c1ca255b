"""The preparation pipeline: from a captured model to a graph with fake-quantizers that still do nothing."""

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig
from ptq4vm.graph.capture import capture
from ptq4vm.graph.partition import check_borders
from ptq4vm.graph.pipeline import Pass, Pipeline
from ptq4vm.graph.sites import LinearSite, sites_of
from ptq4vm.graph.verify import GraphStage
from ptq4vm.metadata import COVERAGE, LinearMetadata, QuantizationMetadata, architecture_of, set_metadata
from ptq4vm.passes.prepare.annotate import InsertFakeQuantizers
from ptq4vm.passes.prepare.bias_correction import insert_corrections
from ptq4vm.passes.prepare.canonicalize import canonicalization
from ptq4vm.passes.prepare.decompose import decompose_fused_ops
from ptq4vm.passes.prepare.reparameterize import InsertFactors
from ptq4vm.passes.prepare.rotate import insert_rotation
from ptq4vm.passes.prepare.select import SelectSites
from ptq4vm.passes.prepare.smooth import insert_smoothing
from ptq4vm.passes.quantized_nodes import quantized_linears, quantized_scans
from ptq4vm.quantization_specs import Granularity
from ptq4vm.serialization.model_file import portable


def preparation_pipeline(config: QuantConfig, only: frozenset[str] | None = None) -> Pipeline:
    """Returns the passes from a captured graph to a prepared one, to be run or printed.

    `only` names the linears to quantize where a saved model has decided.

    >>> print(preparation_pipeline(QuantConfig.w8a8()))  # doctest: +ELLIPSIS
    prepared
      captured
        matmul_to_linear
        ...
        SelectSites()
        insert_smoothing
      InsertFakeQuantizers()
    """
    passes: list[Pass] = [*canonicalization(config.pooled).passes]
    if config.outputs is not None:
        passes += [decompose_fused_ops]
    passes += [SelectSites(config, only)]
    if config.state is not None and config.state.factors is not None:
        passes += [InsertFactors(config.state.integrate)]
    if config.smoothing is not None or config.activations.granularity is Granularity.K_SCALED_CHANNEL:
        passes += [insert_smoothing]
    if config.rotation:
        passes += [insert_rotation]
    if config.bias_correction:
        passes += [insert_corrections]
    return Pipeline(GraphStage.PREPARED, (Pipeline(GraphStage.CAPTURED, tuple(passes)), InsertFakeQuantizers(config)))


def prepared_graph(
    model: nn.Module, example_inputs: tuple[Any, ...], config: QuantConfig, only: frozenset[str] | None = None
) -> GraphModule:
    """Returns the model, captured and prepared; `only` as in `preparation_pipeline`."""
    return prepare_captured(capture(model, example_inputs), model, example_inputs, config, only)


def prepare_captured(
    captured: GraphModule,
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    config: QuantConfig,
    only: frozenset[str] | None = None,
) -> GraphModule:
    """Returns `prepared_graph` from the captured graph of `model`, which is changed in place."""
    gm = preparation_pipeline(config, only)(captured)
    coverage = gm.meta[COVERAGE]
    gm = portable(gm, type(captured).__name__)
    check_borders(gm, [site.node for site in quantized_linears(gm) or quantized_scans(gm)])
    linears = tuple(
        LinearMetadata(name=site.name, tokens=site.tokens, in_features=site.in_features, out_features=site.out_features)
        for site in sites_of(gm, LinearSite).values()
    )
    shapes = tuple(tuple(value.shape[1:]) for value in example_inputs if isinstance(value, Tensor))
    metadata = QuantizationMetadata(
        config=config,
        linears=linears,
        input_shapes=shapes,
        architecture=architecture_of(model, shapes),
        coverage=coverage,
    )
    return set_metadata(gm, metadata)
