"""Finds the tokens and channels that a chain of views, flips and pads selects, by running it on indices."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from ptq4vm.graph.insert import aten
from ptq4vm.graph.views import is_view

_OTHERS = {
    aten.flip.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.cat.default,
    aten.tensor_split.indices,
}


@dataclass(frozen=True)
class TokenMap:
    """A value that holds nothing but tokens (T,) and channels [first, last) of `source`."""

    source: Node
    tokens: Tensor
    """Row-major index of each token in the source; -1 for a token of zeros."""
    first: int
    last: int

    def is_natural(self, count: int) -> bool:
        """Returns whether all `count` tokens of the source come in their own order."""
        return torch.equal(self.tokens, torch.arange(count))


def moves_tokens(node: Any) -> bool:
    """Returns whether a node selects, arranges or pads with zeros what its arguments hold."""
    if is_view(node):
        return True
    if not isinstance(node, Node) or node.target not in _OTHERS:
        return False
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        # x, sizes, then the mode (of pad) and the value
        return all(argument in ("constant", None, 0, 0.0) for argument in node.args[2:])
    return True


def token_map(node: Node, until: Node | None = None) -> TokenMap | None:
    """Returns where the elements of `node` (B, …, C) come from, back to `until` or to the first value that is computed.

    Axes between the first and the channels are tokens. A source (B, E, H, W) that a convolution made has its channels
    second. None where there are several sources, or where elements are not arranged token by token.
    """
    members: dict[Node, None] = {}
    sources: dict[Node, None] = {}

    def visit(value: Node) -> None:
        if value in members or value in sources:
            return
        if value is until or not moves_tokens(value):
            sources[value] = None
            return
        for argument in value.all_input_nodes:
            visit(argument)
        members[value] = None

    visit(node)
    tensors = [source for source in sources if isinstance(source.meta.get("val"), Tensor)]
    if len(tensors) != 1:
        return None
    (source,) = tensors
    shape = source.meta["val"].shape
    if len(shape) < 3 or not all(isinstance(size, int) for size in shape[1:]):
        return None
    # two images whose elements are their numbers from 1 on: zeros come from padding
    numbers = torch.arange(1, 2 * math.prod(shape[1:]) + 1).view(2, *shape[1:])
    indices = _indices(members, {other: 2 for other in sources if other is not source} | {source: numbers})
    return None if indices is None else _decoded(source, indices(node))


def _indices(members: dict[Node, None], values: dict[Node, Any]) -> Any:
    try:
        for member in members:
            arguments, options = fx.map_arg((member.args, member.kwargs), values.__getitem__)
            values[member] = member.target(*arguments, **options)  # type: ignore[operator]
    except (RuntimeError, KeyError, IndexError, TypeError):
        return None  # a view of a size that was computed from more than the batch
    return values.__getitem__


def _decoded(source: Node, indices: Any) -> TokenMap | None:
    if not isinstance(indices, Tensor) or indices.dim() < 3 or indices.shape[0] != 2:
        return None
    shape = source.meta["val"].shape
    count = math.prod(shape[1:])
    one, two = indices.flatten(1, -2).unbind(0)
    real = one > 0
    if not torch.equal(torch.where(real, one + count, 0), two) or not torch.equal(real.all(-1), real.any(-1)):
        return None
    numbers = one - 1
    if channels_first(source):
        channels, tokens = numbers // math.prod(shape[2:]), numbers % math.prod(shape[2:])
    else:
        channels, tokens = numbers % shape[-1], numbers // shape[-1]
    real = real[:, 0]
    if not real.any():
        return None
    first = int(channels[real][0, 0])
    wanted = torch.arange(first, first + one.shape[1])
    if not (channels[real] == wanted).all() or not (tokens[real] == tokens[real][:, :1]).all():
        return None
    return TokenMap(source, torch.where(real, tokens[:, 0], -1), first, first + one.shape[1])


_ELEMENTWISE = {aten.silu.default, aten.gelu.default, aten.relu.default}


def channels_first(node: Node) -> bool:
    """Returns whether a value is the result of a 2-D convolution, or of an activation behind one."""
    while node.target in _ELEMENTWISE:
        (node,) = node.all_input_nodes
    return node.target in (aten.conv2d.default, aten.convolution.default)
