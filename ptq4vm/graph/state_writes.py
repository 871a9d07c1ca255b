"""Writes to tensors inside forward: dropped where no result depends on them."""

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ptq4vm.graph.capture_errors import CaptureError
from ptq4vm.graph.insert import aten
from ptq4vm.graph.user_code import recorded_line
from ptq4vm.graph.views import scope

_CASTS = {aten.type_as.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other}


def is_write(node: Node) -> bool:
    """Returns whether a node changes an argument in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def drop_unread_writes(gm: GraphModule) -> None:
    """Erases changes of tensors of the model that nothing else reads, such as a counter of calls, in place."""
    for tensor in gm.graph.find_nodes(op="placeholder"):
        if all(is_write(user) and not user.users for user in tensor.users):
            for user in list(tensor.users):
                gm.graph.erase_node(user)


def clone_inputs(program: ExportedProgram) -> None:
    """Lets a program read copies of its inputs, in place: torch cannot run one that changes an input itself."""
    graph, names = program.graph, set(program.graph_signature.user_inputs)
    inputs = [node for node in graph.find_nodes(op="placeholder") if node.name in names and _is_tensor(node)]
    for node in inputs:
        with graph.inserting_before(next(each for each in graph.nodes if each.op != "placeholder")):
            clone = graph.call_function(aten.clone.default, (node,))
        clone.meta.update(node.meta)
        node.replace_all_uses_with(clone, delete_user_cb=lambda user, clone=clone: user is not clone)


def drop_clones_of_inputs(gm: GraphModule) -> None:
    """Erases copies of inputs, which a graph without changes in place has no need of, in place."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.clone.default):
        source = node.args[0]
        if isinstance(source, Node) and source.op == "placeholder" and not node.kwargs:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def drop_state_writes(gm: GraphModule) -> None:
    """Erases what a captured model writes to its tensors and inputs after the work is done, in place.

    A counter, or `self.mean = self.mean.type_as(x)`: a graph is to compute the same at every call. Raises CaptureError
    for a model whose results depend on what earlier calls wrote.
    """
    writes = [node for node in gm.graph.nodes if is_write(node)]
    live = _live(gm)
    for node in writes:
        tensor, value, *_ = node.args
        assert isinstance(tensor, Node) and not node.users
        if tensor.op == "get_attr" and tensor in live and not _is_cast(value, tensor):
            place = value if isinstance(value, Node) else node
            raise CaptureError(
                f"{scope(place) or 'the model'} changes its tensor {tensor.target!r} in every forward"
                f"{recorded_line(place)}, and its result depends on the change: a quantized model has no state; set "
                "that tensor before `prepare`, or compute with a copy of it"
            )
        gm.graph.erase_node(node)


def _live(gm: GraphModule) -> set[Node]:
    """Returns all that the results are computed from."""
    live: set[Node] = set(gm.graph.output_node().all_input_nodes)
    for node in reversed(gm.graph.nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return live


def _is_cast(value: Any, tensor: Node) -> bool:
    """Returns whether a value is a tensor in another type or on another device."""
    while isinstance(value, Node) and value.target in _CASTS:
        value = value.args[0]
    return value is tensor
