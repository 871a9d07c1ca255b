"""Finds where the results of several scans are added up, each back in the natural order of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ptq4vm.graph.element_numbers import moves_elements
from ptq4vm.graph.insert import aten
from ptq4vm.graph.token_order import token_map
from ptq4vm.passes.lower.patterns import args, is_call, only_user


@dataclass(frozen=True)
class Merge:
    """The sum of all scans of a group, times a factor."""

    total: Node
    factor: float = 1.0


def find_merge(scans: Sequence[Node], orders: Sequence[Tensor]) -> Merge | None:
    """Returns the sum of all scans in natural order; None where there is none, or something else reads a part.

    `orders` says which token each scan reads at its t-th step.
    """
    reached = dict.fromkeys(scans)
    for node in scans[0].graph.nodes:  # in order, so that a sum comes after its terms
        inputs = [source for source in node.all_input_nodes if source in reached]
        moved = bool(inputs) and (moves_elements(node) or is_call(node, aten.add.Tensor))
        if node not in reached and not moved:
            continue
        reached[node] = None
        terms = _terms(node, scans)
        if terms is not None and len(terms) == len(scans) and _is_natural(terms, scans, orders):
            return _with_factor(node) if _is_closed(node, reached) else None
    return None


def _terms(node: Node, scans: Sequence[Node]) -> list[tuple[Node, Tensor]] | None:
    """Returns the scans that a value is the sum of, and which step of each its tokens are; None for other values."""
    found = token_map(node)
    if found is None or bool((found.tokens < 0).any()):
        return None
    source = found.source
    if (found.first, found.last) != (0, source.meta["val"].shape[-1]):
        return None
    if source in scans:
        return [(source, found.tokens)]
    if not is_call(source, aten.add.Tensor) or source.kwargs or len(source.all_input_nodes) != 2:
        return None
    terms: list[tuple[Node, Tensor]] = []
    for value in source.all_input_nodes:
        if value.meta["val"].shape != source.meta["val"].shape or (inner := _terms(value, scans)) is None:
            return None
        terms += inner
    return [(scan, steps[found.tokens]) for scan, steps in terms]


def _is_natural(terms: Sequence[tuple[Node, Tensor]], scans: Sequence[Node], orders: Sequence[Tensor]) -> bool:
    order = dict(zip(scans, orders, strict=True))
    return {scan for scan, _ in terms} == {*scans} and all(
        torch.equal(order[scan][steps], torch.arange(len(steps))) for scan, steps in terms
    )


def _is_closed(total: Node, reached: dict[Node, None]) -> bool:
    """Returns whether everything between the scans and the sum is read for the sum alone."""
    return all(node is total or all(user in reached for user in node.users) for node in reached)


def _with_factor(total: Node) -> Merge:
    """The sum with a number that it is multiplied by or divided by next."""
    user = only_user(total)
    if user is not None and is_call(user, aten.mul.Tensor, aten.div.Tensor) and isinstance(args(user)[1], (int, float)):
        value = float(args(user)[1])
        return Merge(user, value if user.target is aten.mul.Tensor else 1.0 / value)
    return Merge(total)
