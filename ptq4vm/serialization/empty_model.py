"""Builds the lowered graph of a model, to be filled with saved tensors."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ptq4vm.config import QuantConfig
from ptq4vm.metadata import metadata_of
from ptq4vm.passes.lower.pipeline import converted_graph, lowering_pipeline
from ptq4vm.passes.prepare.pipeline import prepared_graph
from ptq4vm.passes.quantized_nodes import (
    quantized_convolutions,
    quantized_linears,
    quantized_outputs,
    quantized_scans,
    weight_of,
)
from ptq4vm.quantization_specs import Granularity


def empty_quantized_model(
    model: nn.Module, example_inputs: tuple[Any, ...], config: QuantConfig, only: Collection[str] | None = None
) -> GraphModule:
    """Returns the lowered graph of a model with scales of one, into which saved tensors are loaded.

    `only` names the linears that are quantized in the saved model, where it is not for the config to say.
    """
    prepared = prepared_graph(model, example_inputs, config, None if only is None else frozenset(only))
    for linear, fact in zip(quantized_linears(prepared), metadata_of(prepared).linears, strict=True):
        if not linear.input.dynamic:
            count = fact.tokens if linear.input.per_token else 1
            linear.input.set_qparams(torch.ones(count), torch.zeros(count, dtype=torch.int32))
        linear.weight.scale = torch.ones(fact.out_features)
    for output in quantized_outputs(prepared):
        single = output.fake.granularity is Granularity.PER_TENSOR
        output.fake.scale = torch.ones(1 if single else output.node.meta["val"].shape[output.fake.axis])
    for convolution in quantized_convolutions(prepared):
        convolution.fake.scale = torch.ones(len(weight_of(convolution)))
    for scan in quantized_scans(prepared):
        per_token = config.state is not None and (config.state.per_token or config.state.factors is not None)
        scan.fake.scale = torch.ones(scan.node.meta["val"].shape[1] if per_token else 1)
    return converted_graph(prepared, lowering_pipeline(config))
