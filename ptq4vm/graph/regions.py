"""Regions that torch.export keeps apart as subgraphs: put back in line where they change no number."""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from ptq4vm.graph.capture_errors import region_error
from ptq4vm.graph.user_code import recorded_line
from ptq4vm.graph.views import scope


def inline_regions(gm: GraphModule) -> None:
    """Copies the nodes of every region without an effect into the graph around it, in place.

    No effect have `torch.enable_grad()` and its kin, since gradients change no output, and autocast that is switched
    off or is for another device than the model's. Raises CaptureError for any other: its linears would stay hidden.
    """
    while (region := next(_regions(gm), None)) is not None:
        if not _changes_nothing(region, gm):
            place = next((path for node in (region, *region.users) if (path := scope(node))), "the model")
            line = next((text for node in (region, *region.users) if (text := recorded_line(node))), "")
            raise region_error(place + line, str(region.target))
        _inline(gm, region)


def _regions(gm: GraphModule) -> Any:
    return (node for node in gm.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator))


def _changes_nothing(region: Node, gm: GraphModule) -> bool:
    if region.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        return True
    if region.target is not torch.ops.higher_order.wrap_with_autocast:
        return False
    device, _, enabled, *_ = region.args
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return not enabled or all(value.device.type != device for value in values if isinstance(value, Tensor))


def _inline(gm: GraphModule, region: Node) -> None:
    """Copies a region's body to where it is called; its results replace what reads them."""
    at = next(i for i, value in enumerate(region.args) if _is_body(gm, value))
    body_path: Any = region.args[at]
    path, operands = str(body_path.target), region.args[at + 1 :]
    body = gm.get_submodule(path)
    assert isinstance(body, GraphModule)
    copies: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with gm.graph.inserting_before(region):
        for node in body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                copies[node] = gm.graph.node_copy(node, lambda source: copies[source])
                if node.op in ("get_attr", "call_module"):
                    copies[node].target = f"{path}.{node.target}"
    results: Any = fx.map_arg(body.graph.output_node().args[0], lambda node: copies[node])
    for user in list(region.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(region)
    if not body_path.users:
        gm.graph.erase_node(body_path)


def _is_body(gm: GraphModule, value: Any) -> bool:
    if not isinstance(value, Node) or value.op != "get_attr":
        return False
    found: Any = gm
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return isinstance(found, GraphModule)
