"""Captures a model with torch.export as an ATen graph: batch dynamic, all other sizes fixed."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx import GraphModule, Node

from ptq4vm.graph.insert import arguments, aten
from ptq4vm.graph.model_copy import copied_model
from ptq4vm.graph.pipeline import clean_up
from ptq4vm.graph.views import scope


class CaptureError(RuntimeError):
    """The model has no graph that torch.export can see."""


def capture(model: nn.Module, example_inputs: tuple[Any, ...]) -> GraphModule:
    """The model, in evaluation mode, as an ATen graph with a dynamic batch; the caller's model is left alone.

    The first axis of every example tensor is the batch. Raises `CaptureError`, which names the module that
    torch.export could not follow, and ValueError for example inputs without tensors or a model that cannot be copied.
    """
    if not any(isinstance(value, Tensor) and value.dim() for value in example_inputs):
        raise ValueError("example_inputs must hold at least one tensor whose first axis is the batch")
    model = copied_model(model)
    inputs = tuple(_example(value) for value in example_inputs)
    try:
        gm = _export(model, inputs)
    except Exception as error:
        raise CaptureError(_capture_message(model, inputs, error)) from error
    _clean(gm)
    _reject_hidden_regions(gm)
    _guard_inputs(gm, inputs)
    return clean_up(fx.GraphModule(gm, gm.graph, type(model).__name__))


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
    with torch.no_grad():
        program = export(model, inputs, dynamic_shapes=shapes, strict=False)
        if any(_changes_arguments(node) for node in program.graph.nodes):
            program = program.run_decompositions({})  # into operators that change nothing
        return program.module()


def _changes_arguments(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _capture_message(model: nn.Module, inputs: tuple[Any, ...], error: Exception) -> str:
    """Runs the export again with hooks, to say in which module it stopped."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        path = f"{name} ({type(module).__name__})" if name else type(module).__name__
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        _export(model, inputs)
    except Exception:
        pass
    finally:
        for handle in handles:
            handle.remove()
    where = running[-1] if running else type(model).__name__
    reason = str(error).strip().split("\n", 1)[0][:300]
    return (
        f"torch.export cannot capture {where}: {type(error).__name__}: {reason}. "
        "Rewrite its forward without branches on tensor values or on the batch size (torch.where, torch.cond), "
        "or wrap that code in a torch.library.custom_op with a fake; then "
        "`torch.export.export(model, example_inputs)` must succeed"
    )


def _clean(gm: GraphModule) -> None:
    """Drops torch.export's guards and device asserts: they pin the device and the dtype."""
    for node in list(gm.graph.nodes):
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if guard or node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)


def _reject_hidden_regions(gm: GraphModule) -> None:
    """Autocast, `torch.enable_grad()` and control-flow operators make subgraphs whose linears no pass sees.

    A region under `torch.no_grad()` makes none: capture runs without gradients anyway.
    """
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"{scope(node) or 'the model'} has a region torch.export keeps apart ({node.target.name()}), so its "
                "linears would stay hidden; call the model without autocast, torch.enable_grad() or "
                "control-flow operators inside forward"
            )


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
