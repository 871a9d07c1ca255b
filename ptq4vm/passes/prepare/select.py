"""Selects what a config quantizes, and says so in the nodes' metadata: linears, convolutions, scans, outputs.

Shapes: x (B, L, C), or (B, C, H, W) where a 2-D convolution made it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.config import QuantConfig, matches
from ptq4vm.graph.class_token import class_tokens
from ptq4vm.graph.element_numbers import moved_value
from ptq4vm.graph.insert import aten, attribute
from ptq4vm.graph.pieces import with_pieces
from ptq4vm.graph.sites import (
    CONVOLUTIONS,
    LEFT,
    POOLED,
    SITE,
    ConvolutionSite,
    LinearSite,
    OutputSite,
    ScanSite,
    Site,
    find_linears,
    numbered,
    update_site,
)
from ptq4vm.graph.token_order import channels_first
from ptq4vm.graph.views import parameter_of, scope, writes_stream
from ptq4vm.metadata import COVERAGE
from ptq4vm.passes.prepare.coverage import covered, ends
from ptq4vm.quantization_specs import Granularity


@dataclass(frozen=True)
class SelectSites:
    """Gives every node that the config quantizes its `Site`; the graph is canonical, decomposed with `outputs`.

    Raises ValueError where nothing is left to quantize, where a pattern matches nothing, where a weight is not float32,
    and where an accumulator could overflow int32.
    """

    config: QuantConfig = dataclasses.field(repr=False)
    only: frozenset[str] | None = dataclasses.field(default=None, repr=False)
    """Names of the linears to quantize where a saved model has decided; None where the config does."""

    def __call__(self, gm: GraphModule) -> GraphModule:
        config, found = self.config, find_linears(gm)
        left = _left(gm, found, config, self.only)
        chosen = {node: site for node, site in found.items() if node not in left}
        _check_chosen(gm, config, found, chosen)
        sites: dict[Node, Site] = dict(with_pieces(gm, chosen))
        if config.state is not None:
            sites |= _scans(gm)
        if config.outputs is not None:
            sites |= _outputs(gm, sites, config.outputs.k_scaled)
        gm.meta[COVERAGE] = covered(gm, found, left, set(sites))
        for node, site in sites.items():
            node.meta[SITE] = site
        linears = [node for node, site in sites.items() if isinstance(site, LinearSite)]
        if config.class_token_in_float:
            for node, index in class_tokens(gm, linears).items():
                update_site(node, float_token_index=index)
        for node in linears:
            update_site(node, shares_qparams_with=_shared(node, sites))
        return gm


def _left(
    gm: GraphModule, found: Mapping[Node, LinearSite], config: QuantConfig, only: frozenset[str] | None
) -> dict[Node, str]:
    """Returns why the config leaves products of weights: linears on tokens, and heads that read pooled values.

    Stem and head are apart in a model with numbered blocks, unless `outputs` quantizes everywhere. In any other model
    all linears count, but for a head that reads one value per image.
    """
    if only is not None:
        return {node: "not in the saved model" for node, site in found.items() if site.name not in only}
    blocks = any(site.block is not None for site in found.values())
    left: dict[Node, str] = {}
    for node, end in ends(gm).items():
        site = found.get(node)
        pooled = node.meta.get(LEFT) == POOLED if site is None else config.pooled and site.tokens == 1
        apart = site is not None and site.block is None and blocks and config.outputs is None
        if apart or (pooled and end == "head" and (site is None or config.outputs is None)):
            left[node] = end
    return left | {node: "excluded" for node, site in found.items() if matches(site.name, config.exclude)}


def _check_chosen(
    gm: GraphModule, config: QuantConfig, found: Mapping[Node, LinearSite], chosen: Mapping[Node, LinearSite]
) -> None:
    for key in ("exclude", "eight_bit"):
        for pattern in getattr(config, key):
            if not any(matches(site.name, (pattern,)) for site in found.values()):
                raise ValueError(f"{key} pattern {pattern!r} matches no linear; there are {_names(found.values())}")
    if not chosen and config.state is None:
        raise ValueError(
            "the model has no linear to quantize: a linear is a parameter (N, D) times tokens (B, L, D), and neither "
            f"stem nor head; found {len(found)} on tokens, and exclude={list(config.exclude)}"
        )
    only = config.learning.only if config.learning is not None else ()
    if only and not any(matches(site.name, only) for site in chosen.values()):
        raise ValueError(f"learning.only={list(only)} matches no linear; there are {_names(chosen.values())}")
    for site in chosen.values():
        _check_linear(gm, site, config)


def _check_linear(gm: GraphModule, site: LinearSite, config: QuantConfig) -> None:
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


def _names(sites: Iterable[LinearSite]) -> str:
    names = [site.name for site in sites]
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


_KINDS: dict[Any, str] = {
    ops.causal_conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.rms_norm.default: "norm",
    aten.layer_norm.default: "norm",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.softplus.default: "softplus",
    ops.selective_scan.default: "selective_scan",
}
"""Operators whose results `outputs` quantizes, beside linears."""


def _operators(gm: GraphModule) -> dict[Node, str]:
    """The operators above by name: `layers.0.mixer.silu`, at a second one there `layers.0.mixer.silu@1`."""
    seen: dict[str, int] = {}
    nodes = [node for node in gm.graph.nodes if node.target in _KINDS]
    return {node: numbered(f"{scope(node)}.{_KINDS[node.target]}".removeprefix("."), seen) for node in nodes}


def _scans(gm: GraphModule) -> dict[Node, Site]:
    scans = {node: name for node, name in _operators(gm).items() if node.target is ops.selective_scan.default}
    if not scans:
        raise ValueError("state is for models with a selective scan, and this one has none: leave it out")
    return {node: ScanSite(name=name) for node, name in scans.items()}


def _outputs(gm: GraphModule, sites: Mapping[Node, Site], k_scaled: bool) -> dict[Node, Site]:
    """The sites that have quantized results, and convolutions of parameters, whose weights are quantized too."""
    names = _operators(gm)
    found: dict[Node, Site] = {}
    for node in gm.graph.nodes:
        if node not in sites and node not in names:
            continue
        output = _k_scaled(node) if k_scaled else OutputSite(granularity=Granularity.PER_TENSOR)
        convolution = node.target in CONVOLUTIONS and parameter_of(node.args[1]) is not None
        site = sites.get(node) or (ConvolutionSite if convolution else Site)(name=names[node])
        found[node] = dataclasses.replace(site, output=output)
    return found


def _k_scaled(node: Node) -> OutputSite:
    """Several intervals where the k-scaled paper has them."""
    value = node.meta["val"]
    channels = 1 if channels_first(node) else value.dim() - 1
    if node.target is ops.selective_scan.default or (node.target is aten.linear.default and writes_stream(node)):
        return OutputSite(granularity=Granularity.K_SCALED_TOKEN, power_of_two=True)
    if node.target is ops.causal_conv1d.default or _is_depthwise(node):
        return OutputSite(granularity=Granularity.K_SCALED_CHANNEL, axis=channels, power_of_two=True)
    if node.target in (aten.silu.default, aten.gelu.default, aten.softplus.default) and value.dim() > 2:
        return OutputSite(granularity=Granularity.K_SCALED_CHANNEL, axis=channels)
    return OutputSite(granularity=Granularity.PER_TENSOR)


def _is_depthwise(node: Any) -> bool:
    return node.target is aten.conv2d.default and (
        node.args[1].meta["val"].shape[1] == 1 < node.args[0].meta["val"].shape[1]
    )


def _shared(linear: Node, sites: Mapping[Node, Site]) -> str | None:
    """The name of the quantized value whose elements a linear reads, if one scale serves all of it.

    Scales of channels would have to go into the weight, which then needs a finer one: a value that has them is rounded
    again for the linear.
    """
    node: Any = linear.args[0]
    while (moved := moved_value(node)) is not None:
        node = moved
    site = sites.get(node)
    single = site is not None and site.output is not None and site.output.granularity is Granularity.PER_TENSOR
    return site.name if site is not None and single else None
