"""What fusing passes share: reading a lowered graph, rewriting it, and noting what was fused or left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import fused, ops, reference
from ptq4vm.graph import Insertion, aten, attribute, scope
from ptq4vm.passes.tokens import channels_first, moves_tokens, token_map

FUSIONS = "ptq4vm.fusions"
"""The key in a graph's `meta` of every `Fusion` so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """One place that was fused, or was left and why."""

    place: str
    """Path of the module around it."""
    pattern: str
    left: str | None = None
    """Why it was left; None where it was fused."""


class Left(Exception):
    """A pattern does not apply; its message is the reason."""


def note(gm: GraphModule, node: Node, pattern: str, left: str | None = None) -> None:
    gm.meta[FUSIONS].append(Fusion(place=scope(node) or "the model", pattern=pattern, left=left))


# --- reading a graph ---


def read_constant(gm: GraphModule, node: Any, what: str) -> Tensor:
    """Value of a parameter or a buffer; raises `Left` for anything else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        raise Left(f"{what} is computed when the model runs")
    return attribute(gm, str(node.target)).detach()


def read_optional(gm: GraphModule, node: Any, what: str) -> Tensor | None:
    return None if node is None else read_constant(gm, node, what)


def args(node: Node) -> tuple[Any, ...]:
    """Arguments as they are; they are Any to whoever reads them."""
    return node.args


def arguments(node: Node) -> tuple[Any, ...]:
    """All arguments in the order of the schema, with the defaults of those left out."""
    target: Any = node.target
    schema = target._schema.arguments
    return tuple(
        args(node)[i] if i < len(args(node)) else node.kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(schema)
    )


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a value is the result of one of these operators."""
    return isinstance(node, Node) and node.target in targets


def only_user(node: Node) -> Node | None:
    """The one reader; None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def same_tokens(node: Node) -> Node:
    """What a value is before views that keep every token and channel in its place, such as a flatten of (H, W)."""
    while moves_tokens(node) and len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        found = token_map(node, until=source)
        shape: tuple[Any, ...] = source.meta["val"].shape if isinstance(source.meta.get("val"), Tensor) else ()
        whole = found and found.is_natural(math.prod(shape[1:-1])) and (found.first, found.last) == (0, shape[-1])
        if not whole or channels_first(source) or only_user(source) is not node:
            return node
        node = source
    return node


@dataclass(frozen=True)
class Quantizer:
    """A static quantize node's arguments."""

    node: Node
    x: Node
    inv_scale: Tensor
    zero_point: Tensor
    inv_smooth: Tensor | None
    bits: int


def read_quantizer(gm: GraphModule, node: Any) -> Quantizer:
    """Raises `Left` for anything but a static quantize node."""
    if not is_call(node, ops.quantize.default):
        raise Left("its result is not quantized")
    x, inv_scale, zero_point, inv_smooth, bits = args(node)
    scale = read_constant(gm, inv_scale, "the scale (per-token dynamic)")
    if scale.dim() != 1:
        raise Left("its scales are per image")
    zero = read_constant(gm, zero_point, "the zero point")
    return Quantizer(node, x, scale, zero, read_optional(gm, inv_smooth, "the smoothing vector"), bits)


# --- rewriting it ---


def swap(gm: GraphModule, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)


def as_tokens(insert: Insertion, node: Node) -> Node:
    """(B, …, D) as (B, L, D)."""
    dim = node.meta["val"].dim()
    return node if dim == 3 else insert.call(aten.flatten.using_ints, node, 1, dim - 2)


def shaped_as(insert: Insertion, node: Node, like: Node) -> Node:
    """(B, L, D) with the token axes of `like`."""
    sizes = list(like.meta["val"].shape[1:-1])
    return node if len(sizes) == 1 else insert.call(aten.unflatten.int, node, 1, sizes)


def pack_weights(
    insert: Insertion, name: str, weights: Sequence[Tensor], channels: int, stack: bool
) -> tuple[Node, Node]:
    """Constants for linears: packed codes and their sums."""
    four = weights[0].dtype == torch.uint8
    codes = [reference.unpack_int4(weight, channels) if four else weight for weight in weights]
    whole = torch.stack(codes) if stack else codes[0]
    packed = insert.tensor(f"{name}_packed", fused.pack_weight(whole, 4 if four else 8))
    return packed, insert.tensor(f"{name}_sum", whole.sum(-1, dtype=torch.int32))
