"""Chooses what a config quantizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from ptq4vm.config import Granularity, QuantConfig, matches
from ptq4vm.graph.insert import attribute
from ptq4vm.graph.sites import LinearSite, find_linears


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
