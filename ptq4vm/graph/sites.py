"""Canonical linears, and the block that each is in.

Shapes: B images (dynamic), L tokens (static), D channels in, N channels out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import (
    aten,
)
from ptq4vm.graph.views import parameter_of, scope

CONVOLUTIONS = (ops.causal_conv1d.default, aten.conv2d.default)


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One canonical linear: x (B, L, D) times a parameter (N, D)."""

    name: str
    """Path of the module whose `weight` it is, such as `layers.0.mixer.in_proj`; of a bare parameter `w`, `w_linear`;
    `name@1` at a second call of one weight."""
    node: Node
    weight: str
    """Path of the weight parameter."""
    tokens: int
    in_features: int
    out_features: int
    block: str | None
    """Path of the block around it; None in the stem, the head, and between the blocks of a stage."""


def find_linears(gm: GraphModule) -> list[LinearSite]:
    """Every `aten.linear` of a parameter on (B, L, D), in graph order."""
    sites: list[LinearSite] = []
    seen: dict[str, int] = {}
    nodes = [node for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default) if on_tokens(node)]
    for node, block in zip(nodes, block_paths(nodes), strict=True):
        weight = str(parameter_of(node.args[1]))
        out_features, in_features = node.args[1].meta["val"].shape
        owner, _, leaf = weight.rpartition(".")
        label = owner if owner and leaf == "weight" else f"{weight}_linear"
        count = seen[label] = seen.get(label, -1) + 1
        name = f"{label}@{count}" if count else label
        tokens = node.args[0].meta["val"].shape[1]
        sites.append(LinearSite(name, node, weight, tokens, in_features, out_features, block))
    return sites


def on_tokens(linear: Node) -> bool:
    """Whether a linear multiplies a parameter with x (B, L, D), where only B is dynamic."""
    shape = linear.args[0].meta["val"].shape  # type: ignore[union-attr]
    static = [isinstance(size, int) for size in shape]
    return parameter_of(linear.args[1]) is not None and static == [False, True, True]


def block_paths(linears: Sequence[Node]) -> list[str | None]:
    """The block around each linear: the innermost numbered module (`layers.3`, `layers.0.blocks.1`).

    None where there is none, and in a stage, which is a numbered module around other linears' blocks (`layers.0`
    around `layers.0.blocks.1`).
    """
    paths = [_numbered(node) for node in linears]
    blocks = {path for path in paths if path is not None}
    stages = {path for path in blocks if any(other.startswith(f"{path}.") for other in blocks)}
    return [None if path in stages else path for path in paths]


def _numbered(node: Node) -> str | None:
    own = scope(node)
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    numbered = [path for path in paths if re.search(r"(^|\.)\d+$", path) and path != own]
    return numbered[-1] if numbered else None
