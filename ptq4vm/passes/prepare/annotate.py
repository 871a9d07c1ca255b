"""Inserts fake-quantizers at the sites of a graph: torchao's annotations for linears, convolutions and outputs."""

import dataclasses
import unittest.mock
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm.config import QuantConfig
from ptq4vm.graph.insert import module_of, replace_node
from ptq4vm.graph.sites import SITE, ConvolutionSite, LinearSite, OutputSite, ScanSite, Site, sites_of
from ptq4vm.quantization_specs import IntegerRange
from ptq4vm.quantizers import (
    ActivationFakeQuantize,
    OutputFakeQuantize,
    ScanFakeQuantize,
    WeightFakeQuantize,
    quiet_import,
)

with quiet_import():
    import torchao.utils
    from torch.ao.quantization.fx import utils as fx_utils
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer


@dataclass(frozen=True)
class InsertFakeQuantizers:
    """Runs torchao's `prepare_pt2e` with our quantizer; then scans give way to those with a quantized state."""

    config: QuantConfig = dataclasses.field(repr=False)

    def __call__(self, gm: GraphModule) -> GraphModule:
        gm = _quietly(quantize_pt2e.prepare_pt2e, gm, SiteQuantizer(self.config))
        _insert_inputs(gm, self.config)
        for node in sites_of(gm, ScanSite):
            _insert_state(gm, node, self.config)
        for node, site in sites_of(gm, Site).items():
            _name_quantizers(gm, node, site)
        return gm


class SiteQuantizer(Quantizer):
    """Annotates the sites of a graph with our fake-quantizers."""

    def __init__(self, config: QuantConfig) -> None:
        super().__init__()
        self.config = config
        self.specs: dict[tuple[type, IntegerRange, int | None], QuantizationSpec] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        for node, site in sites_of(model, Site).items():
            inputs = self._inputs(node, site)
            output = None if site.output is None else self._output(site.output)
            if inputs or output:
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map=inputs, output_qspec=output, _annotated=True
                )
        return model

    def _inputs(self, node: Node, site: Site) -> dict[Any, QuantizationSpec]:
        if isinstance(site, LinearSite):
            activation = self._spec(ActivationFakeQuantize, self.config.activation(site.name), site.float_token_index)
            return {
                node.args[0]: activation,
                node.args[1]: self._spec(WeightFakeQuantize, self.config.weight(site.name)),
            }
        if isinstance(site, ConvolutionSite):
            assert self.config.outputs is not None
            spec = IntegerRange(bits=self.config.outputs.bits, narrow_range=True)
            return {node.args[1]: self._spec(WeightFakeQuantize, spec)}
        return {}

    def _spec(self, kind: Any, spec: IntegerRange, index: int | None = None) -> QuantizationSpec:
        """Returns one object for equal ones: linears that read one input then share its fake-quantizer."""
        if (kind, spec, index) not in self.specs:
            make = kind.with_args(spec=spec, granularity=self.config.activations.granularity, float_token_index=index)
            self.specs[kind, spec, index] = _specification(spec, make)
        return self.specs[kind, spec, index]

    def _output(self, site: OutputSite) -> QuantizationSpec:
        assert self.config.outputs is not None
        spec = IntegerRange(bits=self.config.outputs.bits, narrow_range=False)
        two = site.power_of_two and self.config.power_of_two
        make = OutputFakeQuantize.with_args(spec=spec, granularity=site.granularity, axis=site.axis, power_of_two=two)
        return _specification(spec, make)

    def validate(self, model: GraphModule) -> None:
        pass


def _specification(spec: IntegerRange, make: Any) -> QuantizationSpec:
    low, high = spec.bounds
    return QuantizationSpec(dtype=torch.int8, observer_or_fake_quant_ctr=make, quant_min=low, quant_max=high)


def _name_quantizers(gm: GraphModule, node: Node, site: Site) -> None:
    """Gives the fake-quantizers around a node the name of its site, and their nodes the recorded values."""
    for user in node.users:
        if isinstance(output := module_of(gm, user), OutputFakeQuantize):
            output.name = site.name
            user.meta.update({key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta})
    for argument in node.all_input_nodes:
        fake = module_of(gm, argument)
        if isinstance(fake, WeightFakeQuantize):
            fake.name = site.name
            argument.meta["val"] = argument.all_input_nodes[0].meta["val"]
        elif isinstance(fake, ActivationFakeQuantize) and isinstance(site, LinearSite):
            fake.name = fake.name or site.name  # one input may feed several linears
            fake.shares_qparams_with = site.shares_qparams_with


def _insert_inputs(gm: GraphModule, config: QuantConfig) -> None:
    """Inserts a fake-quantizer for every input and group of linears that read it.

    torchao makes one for all that read a value, and takes that of an output for the linears that read it as it is.
    Linears of one block, which are calibrated together, may share one, or all where there are no blocks; a linear that
    is in no block has one of its own.
    """
    sites = sites_of(gm, LinearSite)
    blocks = any(site.block is not None for site in sites.values())
    made: dict[tuple[Any, ...], Any] = {}
    for node, site in sites.items():
        x: Any = node.args[0]
        spec, index = config.activation(site.name), site.float_token_index
        output = isinstance(module_of(gm, x), OutputFakeQuantize)
        group = (site.block, site.name if site.block is None else "") if blocks else None
        key = x if output else x.args[0], spec, index, group
        if key not in made:
            fake = ActivationFakeQuantize(spec, config.activations.granularity, index)
            taken = output or x in made.values()
            made[key] = _inserted(gm, f"{node.name}_input", fake, node, (key[0],), x) if taken else x
        node.replace_input_with(x, made[key])


def _insert_state(gm: GraphModule, node: Node, config: QuantConfig) -> None:
    assert config.state is not None
    fake = ScanFakeQuantize(IntegerRange(bits=config.state.bits, narrow_range=False))
    fake.name = node.meta[SITE].name
    replace_node(node, _inserted(gm, f"{node.name}_state", fake, node, node.args, node))


def _inserted(gm: GraphModule, target: str, fake: Any, before: Node, args: Any, like: Node) -> Node:
    """Calls a new module, with the metadata of another node."""
    gm.add_submodule(target, fake)
    with gm.graph.inserting_before(before):
        node = gm.graph.call_module(target, args)
    node.meta.update(like.meta)
    return node


def insert_integers(gm: GraphModule) -> GraphModule:
    """Runs torchao's `convert_pt2e`: fake-quantizers become quantize and dequantize nodes.

    Leaves out its search for the batch norms of quantization-aware training, which takes half a minute to export its
    patterns where a graph has any batch norm, and finds none in graphs of `prepare_pt2e`.
    """
    with unittest.mock.patch.object(quantize_pt2e, "_fold_conv_bn_qat", lambda converted: converted):
        return _quietly(quantize_pt2e.convert_pt2e, gm)


def _quietly(function: Callable[..., GraphModule], *args: Any) -> GraphModule:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)
    finally:
        # they cache the device of every model they have seen, and with it the model, for ever
        for cached in (torchao.utils._assert_and_get_unique_device, fx_utils.assert_and_get_unique_device):
            cached.cache_clear()
