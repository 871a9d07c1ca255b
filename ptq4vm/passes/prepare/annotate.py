"""Inserts fake-quantizers: torchao's annotations for the values that a config quantizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm.config import QuantConfig, QuantSpec, Scheme, State
from ptq4vm.graph.pipeline import finish
from ptq4vm.graph.sites import LinearSite
from ptq4vm.passes.prepare.select import OutputSite, Sites
from ptq4vm.passes.quantized import (
    _module,
    quantized_linears,
)
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
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer


class TokenQuantizer(Quantizer):
    """Annotates a graph with our fake-quantizers: inputs of linears at the config's granularity, weights, outputs."""

    def __init__(self, config: QuantConfig, sites: Sites) -> None:
        super().__init__()
        self.config = config
        self.names = {site.node.name: site.name for site in sites.linears}
        self.class_tokens = sites.class_tokens
        self.outputs = {site.node.name: site for site in sites.outputs}
        self.convolutions = {node.name for node in sites.convolutions.values()}
        self.specs: dict[tuple[type, QuantSpec, int | None], QuantizationSpec] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            inputs: dict[Any, QuantizationSpec] = {}
            if (name := self.names.get(node.name)) is not None:
                kept = self.class_tokens.get(name)
                inputs[node.args[0]] = self._spec(ActivationFakeQuantize, self.config.activation(name), kept)
                inputs[node.args[1]] = self._spec(WeightFakeQuantize, self.config.weight(name))
            elif node.name in self.convolutions:
                assert self.config.outputs is not None
                spec = QuantSpec(bits=self.config.outputs.bits, scheme=Scheme.SYMMETRIC)
                inputs[node.args[1]] = self._spec(WeightFakeQuantize, spec)
            output = self._output(self.outputs[node.name]) if node.name in self.outputs else None
            if inputs or output:
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map=inputs, output_qspec=output, _annotated=True
                )
        return model

    def _spec(self, kind: Any, spec: QuantSpec, kept: int | None = None) -> QuantizationSpec:
        """One object for equal ones: linears that read one input then share its fake-quantizer."""
        if (kind, spec, kept) not in self.specs:
            make = kind.with_args(spec=spec, granularity=self.config.granularity, float_token_index=kept)
            self.specs[kind, spec, kept] = _specification(spec, make)
        return self.specs[kind, spec, kept]

    def _output(self, site: OutputSite) -> QuantizationSpec:
        assert self.config.outputs is not None
        spec = self.config.outputs.spec
        two = site.power_of_two and self.config.power_of_two
        make = OutputFakeQuantize.with_args(spec=spec, granularity=site.granularity, axis=site.axis, power_of_two=two)
        return _specification(spec, make)

    def validate(self, model: GraphModule) -> None:
        pass


def _groups(linears: Sequence[LinearSite]) -> dict[str, str | None]:
    """Which linears, by name, may share the fake-quantizer of one input: those that are calibrated together.

    Those of one block, or all where there are no blocks; what is in no block is alone.
    """
    if all(site.block is None for site in linears):
        return {site.name: None for site in linears}
    return {site.name: site.name if site.block is None else f"block {site.block}" for site in linears}


def _specification(spec: QuantSpec, make: Any) -> QuantizationSpec:
    low, high = spec.bounds
    return QuantizationSpec(dtype=torch.int8, observer_or_fake_quant_ctr=make, quant_min=low, quant_max=high)


def insert_fake_quantizers(gm: GraphModule, config: QuantConfig, sites: Sites) -> GraphModule:
    """torchao's `prepare_pt2e` with our quantizer; then scans give way to those with a quantized state."""
    outputs = {site.node.name: site.name for site in sites.outputs}
    convolutions = {node.name: name for name, node in sites.convolutions.items()}
    scans = {site.node.name: site.name for site in sites.scans}
    gm = _quietly(prepare_pt2e, gm, TokenQuantizer(config, sites))
    _insert_inputs(gm, config, sites)
    for linear in quantized_linears(gm, [site.name for site in sites.linears]):
        linear.weight.name = linear.name
        linear.input.name = linear.input.name or linear.name  # one input may feed several linears
    for node in list(gm.graph.nodes):
        fake = _module(gm, node)
        if isinstance(fake, OutputFakeQuantize):
            made: Any = node.args[0]
            fake.name = outputs[made.name]
            node.meta.update({key: made.meta[key] for key in ("val", "nn_module_stack") if key in made.meta})
        elif isinstance(fake, WeightFakeQuantize):
            constant_node: Any = node.args[0]
            node.meta["val"] = constant_node.meta["val"]
        elif node.name in convolutions:
            weight = _module(gm, node.args[1])
            assert isinstance(weight, WeightFakeQuantize)
            weight.name = convolutions[node.name]
    for node in list(gm.graph.nodes):
        if node.name in scans:
            assert config.state is not None
            _insert_state(gm, node, scans[node.name], config.state)
    return finish(gm)


def _insert_inputs(gm: GraphModule, config: QuantConfig, sites: Sites) -> None:
    """A fake-quantizer for every input and group of linears that read it.

    torchao makes one for all that read a value, and takes that of an output for the linears that read it as it is.
    """
    names, groups = {site.node.name: site.name for site in sites.linears}, _groups(sites.linears)
    made: dict[tuple[Node, QuantSpec, int | None, str | None], Node] = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if node.name not in names:
            continue
        x, name = node.args[0], names[node.name]
        spec, kept = config.activation(name), sites.class_tokens.get(name)
        output = isinstance(_module(gm, x), OutputFakeQuantize)
        key = x if output else x.args[0], spec, kept, groups[name]
        if key not in made:
            made[key] = x if not output and x not in made.values() else _input(gm, node, key[0], x, config, spec, kept)
        node.replace_input_with(x, made[key])


def _input(
    gm: GraphModule, linear: Node, source: Node, like: Node, config: QuantConfig, spec: QuantSpec, kept: int | None
) -> Node:
    target = f"{linear.name}_input"
    gm.add_submodule(target, ActivationFakeQuantize(spec, config.granularity, kept))
    with gm.graph.inserting_before(linear):
        node = gm.graph.call_module(target, (source,))
    node.meta.update(like.meta)
    return node


def _insert_state(gm: GraphModule, node: Node, name: str, state: State) -> None:
    fake = ScanFakeQuantize(QuantSpec(bits=state.bits, scheme=Scheme.AFFINE))
    fake.name = name
    target = f"{node.name}_state"
    gm.add_submodule(target, fake)
    with gm.graph.inserting_before(node):
        replaced = gm.graph.call_module(target, node.args)
    replaced.meta.update(node.meta)
    node.replace_all_uses_with(replaced)
    gm.graph.erase_node(node)


def insert_integers(gm: GraphModule) -> GraphModule:
    """torchao's `convert_pt2e`: fake-quantizers become quantize and dequantize nodes."""
    return _quietly(convert_pt2e, gm)


def _quietly(function: Callable[..., GraphModule], *args: Any) -> GraphModule:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)
    finally:
        # they cache the device of every model they have seen, and with it the model, for ever
        for cached in (torchao.utils._assert_and_get_unique_device, fx_utils.assert_and_get_unique_device):
            cached.cache_clear()
