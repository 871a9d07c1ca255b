"""Matches one direction of a selective scan: projection, dt, convolution, gate, and the order of its tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.element_numbers import moved_value
from ptq4vm.graph.token_order import TokenMap, token_map
from ptq4vm.passes.lower.patterns import (
    NotFused,
    Quantizer,
    args,
    is_call,
    only_user,
    read_constant,
    read_optional,
    read_quantizer,
)


@dataclass(frozen=True)
class Branch:
    """One direction: a scan and what it reads."""

    scan: Node
    x: TokenMap  # what the convolution, or the scan without one, reads
    conv: Node | None  # the causal convolution of this direction
    input: Quantizer
    projection: Node
    dt: Quantizer
    dt_linear: Node
    z: TokenMap | None

    @property
    def ranks(self) -> tuple[int, int]:
        """R and S."""
        return self.dt.x.meta["val"].shape[-1], args(self.scan)[2].meta["val"].shape[-1]


def selection_of(node: Any, what: str) -> TokenMap:
    found = token_map(node) if isinstance(node, Node) else None
    if found is None:
        raise NotFused(f"{what} is not a selection of tokens and channels of one value")
    return found


def find_branch(gm: GraphModule, scan: Node) -> Branch:
    u, delta, A, B, C, D, z, bias, softplus = args(scan)
    if not softplus or bias is None:
        raise NotFused("its steps have no bias and softplus")
    for constant, what in ((A, "A"), (D, "D"), (bias, "the bias of its steps")):
        read_optional(gm, constant, what)
    if not is_call(delta, ops.linear.default) or args(delta)[5] is not None:
        raise NotFused("its steps do not come from an integer linear")
    step = read_quantizer(gm, args(delta)[0])
    low_rank = selection_of(step.x, "the low-rank step")
    projection, states, rank = low_rank.source, A.meta["val"].shape[-1], step.x.meta["val"].shape[-1]
    tokens = u.meta["val"].shape[1]
    places = [(step.x, 0, rank), (B, rank, rank + states), (C, rank + states, rank + 2 * states)]
    for value, first, last in places:
        found = selection_of(value, "a projection")
        here = (found.source, found.first, found.last) == (projection, first, last)
        if not here or not found.is_natural(tokens):
            raise NotFused("step, B and C are not one projection, cut in this order")
    if not is_call(projection, ops.linear.default) or projection.meta["val"].shape[-1] != rank + 2 * states:
        raise NotFused("its projection is not an integer linear")
    quantize = read_quantizer(gm, args(projection)[0])
    if not _is_same(quantize.x, u):
        raise NotFused("its projection reads something else")
    read_constant(gm, args(projection)[3], "the projection's weight")
    read_constant(gm, args(delta)[3], "the step's weight")
    conv = u if is_call(u, ops.causal_conv1d.default) else None
    if conv is not None and (not args(conv)[3] or len(conv.users) != 2):
        raise NotFused("its convolution has no SiLU, or other readers")
    x = selection_of(u if conv is None else args(conv)[0], "its input")
    gate = None if z is None else selection_of(z, "its gate")
    if gate is not None and not torch.equal(gate.tokens, x.tokens):
        raise NotFused("its gate comes in another order than its input")
    return Branch(scan, x, conv, quantize, projection, step, delta, gate)


def _is_same(a: Node, b: Node) -> bool:
    """Returns whether two values are one, or the same selection of one."""
    ours, theirs = token_map(a), token_map(b)
    if a is b or ours is None or theirs is None:
        return a is b
    places = [(found.source, found.first, found.last) for found in (ours, theirs)]
    return places[0] == places[1] and torch.equal(ours.tokens, theirs.tokens)


def restored_scan(scan: Node, x: TokenMap) -> Node:
    """Returns the node where the scan's tokens are back in natural order."""
    node = scan
    while (user := only_user(node)) is not None and moved_value(user) is node:
        node = user
    places = torch.arange(len(x.tokens)) if node is scan else selection_of(node, "its result").tokens
    count = int(x.tokens.max()) + 1
    if node.meta["val"].dim() != 3 or len(places) != count:
        raise NotFused("its result has other tokens than its input")
    if not torch.equal(x.tokens[places], torch.arange(count)):
        raise NotFused("its result is put back in another order than the natural one")
    return node
