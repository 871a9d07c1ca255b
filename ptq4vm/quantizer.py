"""From a QuantConfig to torchao's annotations. Only this module and `api.py` know that pt2e inserts the observers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.config import QuantConfig, matches
from ptq4vm.fake_quantize import (
    ActivationFakeQuantize,
    OutputFakeQuantize,
    ScanFakeQuantize,
    WeightFakeQuantize,
    constant,
    quiet_import,
)
from ptq4vm.graph import LinearSite, attribute, find_linears, finish
from ptq4vm.specs import Granularity, IntegerRange, StateQuantization

with quiet_import():
    import torchao.utils
    from torch.ao.quantization.fx import utils as fx_utils
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer


CONVOLUTIONS = (ops.causal_conv1d.default, torch.ops.aten.conv2d.default)


def selected_linears(gm: GraphModule, config: QuantConfig) -> list[LinearSite]:
    """The linears that the config quantizes: those inside the model's blocks, less its exclusions; all with `outputs`.

    What lies between the blocks of a stage, such as a downsampling, is inside none. In a model without numbered
    blocks all linears count. Raises ValueError where nothing is left, where a pattern matches nothing, where a weight
    is not float32, and where an accumulator could overflow int32.
    """
    sites = find_linears(gm)
    in_blocks = [site for site in sites if site.block is not None or config.outputs is not None] or sites
    for key in ("exclude", "eight_bit"):
        for pattern in getattr(config, key):
            if not any(matches(site.name, (pattern,)) for site in sites):
                raise ValueError(f"{key} pattern {pattern!r} matches no linear; there are {_names(sites)}")
    chosen = [site for site in in_blocks if not matches(site.name, config.exclude)]
    if not chosen and config.state is None:
        raise ValueError(
            "the model has no linear to quantize: a linear is a parameter (N, D) times tokens (B, L, D); "
            f"found {len(sites)} of them, {len(in_blocks)} inside blocks, and exclude={list(config.exclude)}"
        )
    only = config.learning.only if config.learning is not None else ()
    if only and not any(matches(site.name, only) for site in chosen):
        raise ValueError(f"learning.only={list(only)} matches no linear; there are {_names(chosen)}")
    for site in chosen:
        dtype = attribute(gm, site.weight).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"{site.name}: its weight is {dtype}, and models are quantized from float32: call model.float(), and "
                "give float32 example inputs"
            )
        weight, activation = config.weight(site.name).bits, config.activation(site.name).bits
        if site.in_features * 2**activation * 2 ** (weight - 1) >= 2**31:
            raise ValueError(
                f"{site.name}: {site.in_features} channels at W{weight}A{activation} can "
                "overflow an int32 accumulator; use fewer bits or exclude this linear"
            )
    return chosen


def _names(sites: Sequence[LinearSite]) -> str:
    return ", ".join(site.name for site in sites[:6]) + (", …" if len(sites) > 6 else "")


@dataclass(frozen=True, slots=True)
class OutputSite:
    """A value to be quantized where it is made."""

    name: str
    node: Node
    granularity: Granularity
    axis: int
    """Of the tokens or channels that have step sizes of their own."""
    power_of_two: bool


@dataclass(frozen=True, slots=True)
class ScanSite:
    """A scan whose state is to be quantized."""

    name: str
    node: Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """All that a config quantizes in one model."""

    linears: Sequence[LinearSite] = ()
    class_tokens: Mapping[str, int] = field(default_factory=dict)
    """Of linears, by name: the token that stays in floating point."""
    outputs: Sequence[OutputSite] = ()
    convolutions: Mapping[str, Node] = field(default_factory=dict)
    """Those with a weight to quantize, by name."""
    scans: Sequence[ScanSite] = ()


class TokenQuantizer(Quantizer):
    """Annotates a graph with our fake-quantizers: inputs of linears at the config's granularity, weights, outputs."""

    def __init__(self, config: QuantConfig, sites: Sites) -> None:
        super().__init__()
        self.config = config
        self.names = {site.node.name: site.name for site in sites.linears}
        self.class_tokens = sites.class_tokens
        self.outputs = {site.node.name: site for site in sites.outputs}
        self.convolutions = {node.name for node in sites.convolutions.values()}
        self.specs: dict[tuple[type, IntegerRange, int | None], QuantizationSpec] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            inputs: dict[Any, QuantizationSpec] = {}
            if (name := self.names.get(node.name)) is not None:
                kept = self.class_tokens.get(name)
                inputs[node.args[0]] = self._spec(ActivationFakeQuantize, self.config.activation(name), kept)
                inputs[node.args[1]] = self._spec(WeightFakeQuantize, self.config.weight(name))
            elif node.name in self.convolutions:
                assert self.config.outputs is not None
                spec = IntegerRange(bits=self.config.outputs.bits, narrow_range=True)
                inputs[node.args[1]] = self._spec(WeightFakeQuantize, spec)
            output = self._output(self.outputs[node.name]) if node.name in self.outputs else None
            if inputs or output:
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map=inputs, output_qspec=output, _annotated=True
                )
        return model

    def _spec(self, kind: Any, spec: IntegerRange, kept: int | None = None) -> QuantizationSpec:
        """One object for equal ones: linears that read one input then share its fake-quantizer."""
        if (kind, spec, kept) not in self.specs:
            make = kind.with_args(spec=spec, granularity=self.config.activations.granularity, kept=kept)
            self.specs[kind, spec, kept] = _specification(spec, make)
        return self.specs[kind, spec, kept]

    def _output(self, site: OutputSite) -> QuantizationSpec:
        assert self.config.outputs is not None
        spec = IntegerRange(bits=self.config.outputs.bits, narrow_range=False)
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


def _specification(spec: IntegerRange, make: Any) -> QuantizationSpec:
    low, high = spec.bounds
    return QuantizationSpec(dtype=torch.int8, observer_or_fake_quant_ctr=make, quant_min=low, quant_max=high)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One linear of a prepared graph with its two fake-quantizers and, if there is one, its smoothing vector."""

    name: str
    node: Node
    input: ActivationFakeQuantize
    weight: WeightFakeQuantize
    smooth: torch.nn.Parameter | None
    """log s (D,)"""
    rotated: bool
    """Whether x / s and W · s are rotated."""

    def smoothed(self, x: Tensor) -> Tensor:
        """What has come to its input (…, D) when s was 1, as it comes now."""
        if self.smooth is None:
            return x
        inverse = self.smooth.detach().exp().reciprocal()
        return ops.rotate(ops.rotate(x) * inverse) if self.rotated else x * inverse


@dataclass(frozen=True, slots=True)
class QuantizedOutput:
    """A value of a prepared graph that is quantized where it is made."""

    name: str
    node: Node
    """The fake-quantizer's."""
    fake: OutputFakeQuantize


@dataclass(frozen=True, slots=True)
class QuantizedConvolution:
    """A convolution of a prepared graph with its weight's fake-quantizer."""

    name: str
    node: Node
    weight: WeightFakeQuantize


@dataclass(frozen=True, slots=True)
class QuantizedScan:
    """A scan of a prepared graph with a quantized state."""

    name: str
    node: Node
    fake: ScanFakeQuantize


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
    made: dict[tuple[Node, IntegerRange, int | None, str | None], Node] = {}
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
    gm: GraphModule, linear: Node, source: Node, like: Node, config: QuantConfig, spec: IntegerRange, kept: int | None
) -> Node:
    target = f"{linear.name}_input"
    gm.add_submodule(target, ActivationFakeQuantize(spec, config.activations.granularity, kept))
    with gm.graph.inserting_before(linear):
        node = gm.graph.call_module(target, (source,))
    node.meta.update(like.meta)
    return node


def _insert_state(gm: GraphModule, node: Node, name: str, state: StateQuantization) -> None:
    fake = ScanFakeQuantize(IntegerRange(bits=state.bits, narrow_range=False))
    fake.name = name
    target = f"{node.name}_state"
    gm.add_submodule(target, fake)
    with gm.graph.inserting_before(node):
        replaced = gm.graph.call_module(target, node.args)
    replaced.meta.update(node.meta)
    node.replace_all_uses_with(replaced)
    gm.graph.erase_node(node)


def quantized_outputs(prepared: GraphModule) -> list[QuantizedOutput]:
    """The values of a prepared graph that are quantized where they are made, in graph order."""
    found = [(node, _module(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [QuantizedOutput(fake.name, node, fake) for node, fake in found if isinstance(fake, OutputFakeQuantize)]


def quantized_scans(prepared: GraphModule) -> list[QuantizedScan]:
    """The scans of a prepared graph with a quantized state, in graph order."""
    found = [(node, _module(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [QuantizedScan(fake.name, node, fake) for node, fake in found if isinstance(fake, ScanFakeQuantize)]


def convolution_weight(prepared: GraphModule, convolution: QuantizedConvolution) -> Tensor:
    """The weight (N, …) as its fake-quantizer sees it."""
    quantizer: Any = convolution.node.args[1]
    return constant(prepared, quantizer.args[0]).detach().float()


def quantized_convolutions(prepared: GraphModule) -> list[QuantizedConvolution]:
    """The convolutions of a prepared graph with a quantized weight, in graph order."""
    nodes = [node for node in prepared.graph.nodes if node.target in CONVOLUTIONS]
    found = [(node, _module(prepared, node.args[1])) for node in nodes]
    return [QuantizedConvolution(fake.name, node, fake) for node, fake in found if isinstance(fake, WeightFakeQuantize)]


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


def quantized_linears(prepared: GraphModule, names: Sequence[str]) -> list[QuantizedLinear]:
    """The linears of a prepared graph, in graph order, under the names that `prepare` gave them."""
    found: list[QuantizedLinear] = []
    for node in prepared.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        quantizers = [_module(prepared, arg) for arg in node.args[:2]]
        x, w = quantizers
        if isinstance(x, ActivationFakeQuantize) and isinstance(w, WeightFakeQuantize):
            found.append(QuantizedLinear(names[len(found)], node, x, w, *_before(prepared, node)))
    assert len(found) == len(names), f"{len(found)} quantized linears for {len(names)} names"
    return found


def quantizer_settings(prepared: GraphModule) -> list[tuple[str, list[str]]]:
    """What was decided about the fake-quantizers of a prepared graph before calibration, in graph order."""
    found = [(node.name, _module(prepared, node)) for node in prepared.graph.find_nodes(op="call_module")]
    return [
        (name, [f"{key}={value}" for key, value in vars(fake).items() if key in _SETTINGS])
        for name, fake in found
        if fake is not None
    ]


_SETTINGS = ("spec", "name", "granularity", "kept", "follows", "axis", "power_of_two")


def tap_inputs(linears: Sequence[QuantizedLinear]) -> dict[ActivationFakeQuantize, list[Tensor]]:
    """What will reach each linear's input, piece by piece, until its tap is None; some linears share one."""
    seen: dict[ActivationFakeQuantize, list[Tensor]] = {linear.input: [] for linear in linears}
    for quantizer, pieces in seen.items():
        quantizer.tap = pieces.append
    return seen


def _module(gm: GraphModule, node: object) -> object:
    return gm.get_submodule(str(node.target)) if isinstance(node, Node) and node.op == "call_module" else None


def _before(gm: GraphModule, linear: Node) -> tuple[torch.nn.Parameter | None, bool]:
    """log s and whether x is rotated: x → mul(x, reciprocal(exp(log s))) (→ rotate) → fake-quantizer → linear."""
    observer: Any = linear.args[0]
    value: Any = observer.args[0]
    rotated = isinstance(value, Node) and value.target is ops.rotate.default
    product = value.args[0] if rotated else value
    if not (isinstance(product, Node) and product.target is torch.ops.aten.mul.Tensor):
        return None, rotated
    inverse = product.args[1]
    if not (isinstance(inverse, Node) and inverse.target is torch.ops.aten.reciprocal.default):
        return None, rotated
    scale = inverse.args[0]
    assert isinstance(scale, Node) and isinstance(scale.args[0], Node)
    return gm.get_parameter(str(scale.args[0].target)), rotated
