"""Finds the tokens and channels of one value that another, made of it by views, flips, joins and pads, holds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ptq4vm.graph.element_numbers import IMAGES, ElementNumbers
from ptq4vm.graph.insert import aten


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


def token_map(node: Node, until: Node | None = None) -> TokenMap | None:
    """Returns where the elements of `node` (B, …, C) come from, back to `until` or to the first value that is computed.

    Axes between the first and the channels are tokens. A source (B, E, H, W) that a convolution made has its channels
    second. None where they come from several sources, or are not arranged token by token.
    """
    numbers = ElementNumbers(until)
    found = numbers.of(node)
    return None if found is None or found.dim() < 3 else decoded(numbers, found)


def decoded(numbers: ElementNumbers, found: Tensor) -> TokenMap | None:
    """Returns the token map of a value whose elements have the numbers `found` (B or its multiple, …, C)."""
    source = numbers.source(found)
    if source is None or len(found) % IMAGES:
        return None
    shape = source.meta["val"].shape
    if len(shape) < 3 or not all(isinstance(size, int) for size in shape[1:]):
        return None
    axes = (1, math.prod(shape[2:])) if channels_first(source) else (len(shape) - 1, 1)
    size, step = shape[axes[0]], axes[1]
    count = numbers.count(source)
    one, two = found.reshape(IMAGES, -1, found.shape[-1]).unbind(0)
    real = one > 0
    if not torch.equal(torch.where(real, one + count, 0), two) or not torch.equal(real.all(-1), real.any(-1)):
        return None
    real, places = real[:, 0], one - numbers.start(source)
    if not real.any() or int(places[real].min()) < 0 or int(places[real].max()) >= count:
        return None  # padding alone, or another image
    channels = places // step % size
    tokens = places // (step * size) if step == 1 else places % step
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
