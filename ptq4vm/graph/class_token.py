"""Finds the class token: a parameter between the tokens of an image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm.graph.element_numbers import moves_elements
from ptq4vm.graph.insert import aten
from ptq4vm.graph.token_order import token_map
from ptq4vm.graph.views import parameter_of


def class_tokens(gm: GraphModule, linears: Sequence[Node]) -> dict[Node, int]:
    """Returns the position of the class token in the input of each linear; linears that see none are left out.

    A parameter that `torch.cat` puts among tokens is one. It keeps its place through operators that compute, and moves
    as views and flips say. Raises ValueError for a model without one.
    """
    places: dict[Node, int] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or value.dim() != 3:
            continue
        place = _joined(node)
        if place is None and moves_elements(node):
            place = _moved(node, places)
        elif place is None:
            inputs = [source for source in node.all_input_nodes if source in places]
            place = next((places[source] for source in inputs if source.meta["val"].shape[1] == value.shape[1]), None)
        if place is not None:
            places[node] = place
    found = {linear: places[x] for linear in linears if (x := linear.all_input_nodes[0]) in places}
    if not found:
        raise ValueError(
            "class_token_in_float is for models with a class token, and no linear of this one sees any: leave it out"
        )
    return found


def _joined(node: Node) -> int | None:
    """Returns the position in `cat((patches, class token, patches), 1)`."""
    if node.target is not aten.cat.default or list(node.args[1:]) != [1]:
        return None
    parts: Any = node.args[0]
    before = 0
    for part in parts:
        source = part.args[0] if part.target is aten.expand.default else part
        if parameter_of(source) is not None and part.meta["val"].shape[1] == 1:
            return before
        before += part.meta["val"].shape[1]
    return None


def _moved(node: Node, places: dict[Node, int]) -> int | None:
    found = token_map(node)
    if found is None or found.source not in places:
        return None
    (where,) = torch.nonzero(found.tokens == places[found.source], as_tuple=True)
    return int(where[0]) if len(where) == 1 else None
