"""Computes once what depends on parameters alone, and drops tensors that no node reads."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ptq4vm.graph.insert import attribute, set_tensor


@dataclass(frozen=True)
class FoldConstants:
    """Replaces every tensor that is computed from parameters and buffers alone by a buffer with its value.

    `buffers` limits that to tensors that depend on parameters or buffers whose names end so; results of the operators
    `keep`, and what is computed from them, stay as they are.
    """

    buffers: tuple[str, ...] = ("",)
    keep: tuple[OpOverload, ...] = ()

    def __call__(self, gm: GraphModule) -> GraphModule:
        constants = dict.fromkeys(gm.graph.find_nodes(op="get_attr"))
        for node in gm.graph.nodes:
            sources = node.all_input_nodes
            computed = node.op == "call_function" and node.target not in self.keep
            if computed and sources and all(source in constants for source in sources):
                constants[node] = None
        values: dict[Node, Any] = {}
        names = {name for name, _ in gm.named_buffers()} | {name for name, _ in gm.named_parameters()}
        for node in constants:
            origins = _origins(node)
            roots = [str(source.target) for source in origins if source.op == "get_attr"]
            read = any(user not in constants for user in node.users)
            if not (read and any(root.endswith(self.buffers) for root in roots)):
                continue
            for source in (*origins, node):
                if source not in values:
                    values[source] = _value(gm, source, values)
            if isinstance(values[node], Tensor):
                _replace(gm, node, values[node].detach().clone().contiguous(), _free(f"{roots[0]}_folded", names))
        return gm


@torch.no_grad()
def _value(gm: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        return attribute(gm, str(node.target))
    arguments, options = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    assert callable(node.target)
    return node.target(*arguments, **options)


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
