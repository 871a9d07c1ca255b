"""Gives every weight that a linear sees through views a parameter of its own, (N, D).

    P (K, N, D)                              P.0.weight, P.1.weight, …
    conv.weight (N, D, 1, 1)                 conv.weight
    conv.weight (K·N, D, 1) in K groups      conv.weight.0.weight, …, and its bias (K·N) conv.bias.0.bias, …
    proj.weight[2:5]                         proj.weight.2_5.weight

A parameter with other uses stays, and then `P_linear` takes the place of `P` in the new names. A matrix that is only
transposed stays as it is, under its transposition.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4vm.graph.insert import Insertion, aten, attribute, has_attribute
from ptq4vm.graph.sites import on_tokens
from ptq4vm.graph.views import elements_of, parameter_of, root_of, shows_elements


def own_weights(gm: GraphModule) -> GraphModule:
    """A weight or a bias that a linear on tokens sees through views → a parameter of its own."""
    found: dict[str, list[_Use]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        for position, view in enumerate(node.args[1:], start=1):
            name = parameter_of(view)
            if name is not None and shows_elements(view) and on_tokens(node):
                found.setdefault(name, []).append(_Use(node, position, view))
    for name, uses in found.items():
        _own(gm, name, uses)
    return gm


def unshare_weights(gm: GraphModule) -> GraphModule:
    """A node for each call of a weight: each call has its own scales."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = node.args[1]
        if on_tokens(node) and len(weight.users) > 1:
            with gm.graph.inserting_before(node):
                node.update_arg(1, gm.graph.node_copy(weight))
    return gm


@dataclass(frozen=True, slots=True)
class _Use:
    """A view of a parameter as an argument of a linear: 1 the weight, 2 the bias."""

    linear: Node
    position: int
    view: Node

    def replace(self, node: Node) -> None:
        self.linear.update_arg(self.position, node)


def _own(gm: GraphModule, name: str, uses: Sequence[_Use]) -> None:
    """Each different view of one parameter becomes a parameter; the old one goes where nothing else reads it."""
    value = attribute(gm, name)
    whole = torch.arange(value.numel()).view(value.shape)
    views: list[tuple[Tensor, list[_Use]]] = []
    for use in uses:
        root, elements = root_of(use.view), elements_of(use.view, whole)
        if torch.equal(elements, whole):
            use.replace(root)
        elif whole.dim() == 2 and torch.equal(elements, whole.t()):
            if use.view.target is not aten.t.default or use.view.args[0] is not root:
                use.replace(Insertion(gm, use.linear).call(aten.t.default, root))
        elif same := [group for known, group in views if torch.equal(known, elements)]:
            same[0].append(use)
        else:
            views.append((elements, [use]))
    owned = {(use.linear, use.view) for _, group in views for use in group}
    roots = gm.graph.find_nodes(op="get_attr", target=name)
    stays = any(reading not in owned for root in roots for reading in _readings(root))
    if views and not stays:
        owner, _, leaf = name.rpartition(".")
        delattr(gm.get_submodule(owner), leaf)
    replaced = not stays and any(elements.numel() == whole.numel() for elements, _ in views)
    base = f"{name}_linear" if stays or replaced else name
    for elements, group in views:
        leaf = "weight" if group[0].position == 1 else "bias"
        if replaced and elements.numel() == whole.numel() and not has_attribute(gm, name):
            path = name
        else:
            part = _part(elements, whole.shape)
            path = f"{_unused(gm, f'{base}.{part}' if part else base)}.{leaf}"
        own = value.detach().flatten()[elements.flatten()].view(elements.shape)
        if isinstance(value, nn.Parameter):
            own = nn.Parameter(own, requires_grad=value.requires_grad)
        node = Insertion(gm, group[0].linear).tensor(path, own)
        for use in group:
            use.replace(node)


def _readings(node: Node) -> Iterator[tuple[Node, Node]]:
    """The nodes that compute with a parameter, each with the view it reads."""
    for user in node.users:
        if shows_elements(user):
            yield from _readings(user)
        else:
            yield user, node


def _part(elements: Tensor, shape: Sequence[int]) -> str:
    """Names elements of a tensor: on each axis `2` for the third of equal parts, `2_5` for other ranges, or all."""
    marks = []
    for place, size in zip(torch.unravel_index(elements.flatten(), shape), shape, strict=True):
        start, stop = int(place.min()), int(place.max()) + 1
        part, offset = divmod(start, stop - start)
        if stop - start < size:
            marks.append(f"{start}_{stop}" if offset or size % (stop - start) else f"{part}")
    return "_".join(marks)


def _unused(gm: GraphModule, path: str) -> str:
    return _unused(gm, f"{path}_") if has_attribute(gm, path) else path
