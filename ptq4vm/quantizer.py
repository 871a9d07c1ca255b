"""From a QuantConfig to torchao's annotations. Only this module and `api.py` know that pt2e inserts the observers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.config import QuantConfig, QuantSpec, matches
from ptq4vm.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize, quiet_import
from ptq4vm.graph import LinearSite, attribute, find_linears

with quiet_import():
    import torchao.utils
    from torch.ao.quantization.fx import utils as fx_utils
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer


def selected_linears(gm: GraphModule, config: QuantConfig) -> list[LinearSite]:
    """The linears that the config quantizes: those inside the model's blocks, less its exclusions.

    What lies between the blocks of a stage, such as a downsampling, is inside none. In a model without numbered
    blocks all linears count. Raises ValueError where nothing is left, where a pattern matches nothing, where a weight
    is not float32, and where an accumulator could overflow int32.
    """
    sites = find_linears(gm)
    in_blocks = [site for site in sites if site.block is not None] or sites
    for key in ("exclude", "eight_bit"):
        for pattern in getattr(config, key):
            if not any(matches(site.name, (pattern,)) for site in sites):
                raise ValueError(f"{key} pattern {pattern!r} matches no linear; there are {_names(sites)}")
    chosen = [site for site in in_blocks if not matches(site.name, config.exclude)]
    if not chosen:
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


class TokenQuantizer(Quantizer):
    """Annotates linears with our fake-quantizers: activations at the config's granularity, weights per channel."""

    def __init__(self, config: QuantConfig, sites: Sequence[LinearSite]) -> None:
        super().__init__()
        self.config = config
        self.names = {site.node.name: site.name for site in sites}
        self.specs: dict[tuple[type, QuantSpec], QuantizationSpec] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            name = self.names.get(node.name)
            if name is None:
                continue
            specs = {
                node.args[0]: self._spec(ActivationFakeQuantize, self.config.activation(name)),
                node.args[1]: self._spec(WeightFakeQuantize, self.config.weight(name)),
            }
            node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
        return model

    def _spec(self, kind: Any, spec: QuantSpec) -> QuantizationSpec:
        """One object for equal ones: linears that read one input then share its fake-quantizer."""
        if (kind, spec) not in self.specs:
            low, high = spec.bounds
            make = kind.with_args(spec=spec, granularity=self.config.granularity)
            self.specs[kind, spec] = QuantizationSpec(
                dtype=torch.int8, observer_or_fake_quant_ctr=make, quant_min=low, quant_max=high
            )
        return self.specs[kind, spec]

    def validate(self, model: GraphModule) -> None:
        pass


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


def insert_fake_quantizers(gm: GraphModule, config: QuantConfig, sites: Sequence[LinearSite]) -> GraphModule:
    """torchao's `prepare_pt2e` with our quantizer."""
    return _quietly(prepare_pt2e, gm, TokenQuantizer(config, sites))


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


Seen = dict[ActivationFakeQuantize, list[Tensor]]


def tap_inputs(linears: Sequence[QuantizedLinear]) -> Seen:
    """What will reach each linear's input, piece by piece, until its tap is None; some linears share one."""
    seen: Seen = {linear.input: [] for linear in linears}
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
