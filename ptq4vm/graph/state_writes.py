"""Writes to a model's tensors inside forward: dropped where no result depends on them."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm.graph.capture_errors import CaptureError
from ptq4vm.graph.insert import aten
from ptq4vm.graph.user_code import recorded_line
from ptq4vm.graph.views import is_view, scope

_CASTS = {
    aten.type_as.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
}


def drop_state_writes(gm: GraphModule) -> None:
    """Erases writes to parameters and buffers, in place: a counter, `self.mean = self.mean.type_as(x)`.

    A graph is to compute the same at every call. Raises CaptureError for a model whose results depend on what earlier
    calls wrote.
    """
    writes = [node for node in gm.graph.nodes if is_write(node) and written(node).op == "get_attr"]
    for node in reversed(writes):
        if not node.users and (_casts(node.args[1:], written(node)) or not _is_read(written(node), writes)):
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        if is_write(node) and written(node).op == "get_attr":
            raise CaptureError(
                f"{scope(node) or 'the model'} changes its tensor {written(node).target!r} in every forward"
                f"{recorded_line(node)}, and its result depends on the change: a quantized model has no state; set "
                "that tensor before `prepare`, or compute with a copy of it"
            )


def is_write(node: Node) -> bool:
    """Returns whether a node changes its first argument in place."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and bool(node.args)


def written(node: Node) -> Node:
    """Returns the tensor, seen through views and other writes, that a write changes."""
    value: Any = node.args[0]
    while is_view(value) or (value.op == "call_function" and is_write(value)):
        value = value.args[0]
    assert isinstance(value, Node)
    return value


def _casts(values: Any, tensor: Node) -> bool:
    """Returns whether what is written is the tensor itself in another type or on another device."""
    value = values[0] if values else None
    while isinstance(value, Node) and value.target in _CASTS:
        value = value.args[0]
    return value is tensor


def _is_read(tensor: Node, writes: list[Node]) -> bool:
    """Returns whether anything but writes to it reads a tensor, or a view of it."""
    return any(
        _is_read(user, writes) if is_view(user) or user in writes else True
        for user in tensor.users
        if user not in writes or user.users
    )
