"""Captures a model with torch.export as an ATen graph: batch dynamic, all other sizes fixed."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, Node

from ptq4vm.authors import extensions_replaced
from ptq4vm.graph.capture_errors import CaptureError, capture_error, specialized_error
from ptq4vm.graph.followed_idioms import followed
from ptq4vm.graph.functional_writes import can_rewrite, drop_detachings, is_write, rewrite_writes
from ptq4vm.graph.insert import arguments, aten
from ptq4vm.graph.model_copy import copied_model
from ptq4vm.graph.pipeline import clean_up
from ptq4vm.graph.regions import inline_regions
from ptq4vm.graph.specializations import recorded_branches, recorded_specializations
from ptq4vm.graph.state_writes import (
    clone_inputs,
    drop_clones_of_inputs,
    drop_state_writes,
    drop_unread_writes,
)
from ptq4vm.graph.user_code import UserCode


def capture(model: nn.Module, example_inputs: tuple[Any, ...]) -> GraphModule:
    """The model, in evaluation mode, as an ATen graph with a dynamic batch; the caller's model is left alone.

    The first axis of every example tensor is the batch. Raises `CaptureError`, which names the module, the line of the
    user's code and what to write instead, and ValueError for example inputs without tensors or a model that cannot be
    copied.
    """
    if not any(isinstance(value, Tensor) and value.dim() for value in example_inputs):
        raise ValueError("example_inputs must hold at least one tensor whose first axis is the batch")
    inputs = tuple(_example(value) for value in example_inputs)
    with extensions_replaced():
        gm = _plain(copied_model(model), inputs) or _follow(model, inputs)
    _clean(gm)
    drop_state_writes(gm)
    _guard_inputs(gm, inputs)
    return clean_up(fx.GraphModule(gm, gm.graph, type(model).__name__))


def _plain(copied: nn.Module, inputs: tuple[Any, ...]) -> GraphModule | None:
    """Exports a model; None where torch.export refuses it."""
    try:
        return _export(copied, inputs)
    except CaptureError:
        raise
    except Exception:
        return None


def _follow(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    """Exports a model that plain torch.export refuses: idioms that change nothing are followed.

    Every run finds lines where the batch becomes a number, and the next one follows them.
    """
    namespaces: list[dict[str, Any]] = []
    while True:
        copied = copied_model(model)  # a failed export may leave its own tensors in attributes
        code = UserCode(copied)
        with recorded_specializations(code) as record, followed(copied, namespaces):
            try:
                return _export(copied, inputs)
            except CaptureError:
                raise
            except Exception as error:
                failed = error
        numbers = [each.place.namespace for each in record.found if not isinstance(each.value, bool)]
        more = [each for each in numbers if each and not any(each is known for known in namespaces)]
        if not more:
            raise capture_error(failed, code, record.found) from failed
        namespaces.append(more[0])


def _example(value: Any) -> Any:
    """An ordinary tensor without gradients, of two images where there are fewer: torch.export specializes a batch of
    one or none."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()
    if value.dim() and len(value) < 2:
        return torch.cat((value, value)) if len(value) else value.new_zeros((2, *value.shape[1:]))
    return value


def _export(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    batch, code = Dim("batch"), getattr(type(model).forward, "__code__", None)
    shapes: Any = tuple({0: batch} if isinstance(value, Tensor) and value.dim() else None for value in inputs)
    if code is not None and code.co_argcount == 1 and code.co_flags & inspect.CO_VARARGS:
        shapes = (shapes,)  # of `forward(*args)` torch.export wants one nested tuple
    with torch.no_grad(), recorded_branches(UserCode(model)) as record:
        program = export(model, inputs, dynamic_shapes=shapes, strict=False)
    if record.found:
        raise specialized_error(record.found[0])
    inline_regions(program.graph_module)
    drop_unread_writes(program.graph_module)
    drop_detachings(program.graph)
    return _functional(program)


def _functional(program: ExportedProgram) -> GraphModule:
    """Returns the graph of a program that changes no tensor in place; what forward wrote is written at the end."""
    changes = any(map(is_write, program.graph.nodes))
    if not changes or can_rewrite(program.graph):
        gm: GraphModule = program.module()
        rewrite_writes(gm)
        return gm
    with torch.no_grad():
        clone_inputs(program)
        gm = program.run_decompositions({}).module()  # decomposes nothing
    drop_clones_of_inputs(gm)
    return gm


def _clean(gm: GraphModule) -> None:
    """Drops torch.export's guards and device asserts: they pin the device and the dtype."""
    for node in list(gm.graph.nodes):
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if node.target is aten.lift_fresh_copy.default:  # of a constant that nothing changes any more
            node.replace_all_uses_with(node.args[0])
        if guard or node.target in (aten._assert_tensor_metadata.default, aten.lift_fresh_copy.default):
            gm.graph.erase_node(node)


def check_input(x: Tensor, name: str, shape: list[int], window: list[list[int]]) -> Tensor:
    """x itself, if all its axes but the batch are as captured.

    `window` is the kernel, stride and padding of the convolution that cuts images into patches; empty without one.
    """
    if list(x.shape[1:]) != shape:
        have, want = _described(list(x.shape[1:]), window), _described(shape, window)
        raise ValueError(
            f"{name}: the model was captured for inputs of {want} and given {have}; per-token scales bind a model to "
            "one token count: resize the input, or prepare and calibrate the model at this resolution"
        )
    return x


def _described(shape: list[int], window: list[list[int]]) -> str:
    """3×32×32 (64 patches), or 17×64 (17 tokens)."""
    text = "×".join(map(str, shape))
    if len(shape) == 2:
        return f"{text} ({shape[0]} tokens)"
    if len(shape) == 3 and window:
        patches = math.prod((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[1:], *window, strict=True))
        return f"{text} ({patches} patches)"
    return text


def _window(image: Node) -> list[list[int]]:
    """Kernel, stride and padding of the convolution that reads an image."""
    for user in image.users:
        if user.target is aten.conv2d.default:
            _, weight, _, stride, padding, *_ = arguments(user)
            return [list(weight.meta["val"].shape[2:]), list(stride), list(padding)]
    return []


def _guard_inputs(gm: GraphModule, inputs: tuple[Any, ...]) -> None:
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, Tensor) and value.dim():
            first = next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
            with gm.graph.inserting_before(first):
                captured = (node, node.name, list(value.shape[1:]), _window(node))
                checked = gm.graph.call_function(check_input, captured)
            checked.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(checked, delete_user_cb=lambda user, checked=checked: user is not checked)
