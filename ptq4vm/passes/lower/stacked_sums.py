"""Sums over a stack as additions of its parts, each of which can then be read where it was made.

stack of K values → sum               ⇒ K - 1 additions
stack · stack (of gates) → sum        ⇒ K products and K - 1 additions
"""

import functools
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm.graph.element_numbers import ElementNumbers
from ptq4vm.graph.insert import Insertion, arguments, aten, replace_node
from ptq4vm.passes.lower.patterns import args, is_call, only_user


def add_stacked_sums(gm: GraphModule) -> GraphModule:
    """Adds the parts of a stack in their order. Of more than four torch takes the sum in another order."""
    numbers = ElementNumbers()
    for node in gm.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        value, axes, keeps, _ = arguments(node)
        found, result = value.meta["val"], node.meta["val"]
        if keeps or axes is None or len(axes) != 1 or {found.dtype, result.dtype} != {torch.float32}:
            continue  # halves are summed in float32
        axis = axes[0] % found.dim()
        factors, count = _factors(value), found.shape[axis]
        if isinstance(count, int) and any(_joins(numbers, x, axis) for x in factors):
            insert = Insertion(gm, node)
            parts = [_part(insert, factors, axis, k) for k in range(count)]
            replace_node(node, functools.reduce(functools.partial(insert.call, aten.add.Tensor), parts))
    return gm


def _factors(value: Node) -> list[Node]:
    """Returns the two factors of a product that is summed alone, of as many axes; else the value itself."""
    factors: list[Any] = [*args(value)] if is_call(value, aten.mul.Tensor) and only_user(value) is not None else []
    ranks = [factor.meta["val"].dim() for factor in factors if isinstance(factor, Node)]
    return factors if ranks == [value.meta["val"].dim()] * 2 else [value]


def _part(insert: Insertion, factors: list[Node], axis: int, k: int) -> Node:
    shares = [factor.meta["val"].shape[axis] == 1 for factor in factors]
    parts = [
        insert.call(aten.select.int, factor, axis, 0 if shared else k)
        for factor, shared in zip(factors, shares, strict=True)
    ]
    return functools.reduce(functools.partial(insert.call, aten.mul.Tensor), parts)


def _joins(numbers: ElementNumbers, value: Node, axis: int) -> bool:
    """Returns whether a value has several sources, and each of its parts along an axis has one."""
    found = numbers.of(value)
    return found is not None and numbers.source(found) is None and numbers.is_stacked(found, axis)
