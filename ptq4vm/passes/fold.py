"""What depends on parameters alone is computed once; what nothing reads is dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from ptq4vm.graph import attribute, set_tensor


def fold_constants(gm: GraphModule) -> GraphModule:
    """Replaces every tensor that is computed from parameters and buffers alone by a buffer with its value."""
    values: dict[Node, Any] = {node: attribute(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    for node in list(gm.graph.nodes):
        sources = node.all_input_nodes
        if node.op != "call_function" or not sources or not all(source in values for source in sources):
            continue
        with torch.no_grad():
            arguments, options = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*arguments, **options)
    names = {name for name, _ in gm.named_buffers()} | {name for name, _ in gm.named_parameters()}
    for node, value in values.items():
        read = any(user not in values for user in node.users)
        if node.op != "get_attr" and read and isinstance(value, Tensor):
            first = next(source for source in _origins(node) if source.op == "get_attr")
            _replace(gm, node, value.detach().clone().contiguous(), _free(f"{first.target}_folded", names))
    return gm


def _origins(node: Node) -> list[Node]:
    """Every node that this one depends on, nearest last."""
    found: dict[Node, None] = {}

    def visit(value: Node) -> None:
        for source in value.all_input_nodes:
            visit(source)
            found[source] = None

    visit(node)
    return list(found)


def _free(name: str, taken: set[str]) -> str:
    count, candidate = 0, name
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _replace(gm: GraphModule, node: Node, value: Tensor, name: str) -> None:
    set_tensor(gm, name, value)
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr(name)
    constant.meta["val"] = node.meta.get("val", value)
    node.replace_all_uses_with(constant)


def drop_unused_tensors(gm: GraphModule) -> GraphModule:
    """Deletes parameters and buffers that no node reads, and frees their memory."""
    gm.graph.eliminate_dead_code()
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for name, _ in [*gm.named_parameters(), *gm.named_buffers()]:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)
    return gm
