"""One graph dialect: capture a model with torch.export, find its linears and the block that each is in.

Shapes: B images (dynamic), L tokens (static), D channels in, N channels out.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export import Dim, export
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.model_copy import copied_model

aten = torch.ops.aten


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
    return finish(fx.GraphModule(gm, gm.graph, type(model).__name__))


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
    batch = Dim("batch")
    shapes = tuple({0: batch} if isinstance(value, Tensor) and value.dim() else None for value in inputs)
    with torch.no_grad():
        return export(model, inputs, dynamic_shapes=_by_argument(model, shapes), strict=False).module()


def _by_argument(model: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """`forward(*args)` wants the shapes of its arguments as one nested tuple."""
    code = getattr(type(model).forward, "__code__", None)
    variadic = code is not None and code.co_argcount == 1 and code.co_flags & 0x04
    return (shapes,) if variadic else shapes


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
            # x, weight, bias, stride, padding; trailing defaults are left out
            given: list[Any] = list(user.args)
            _, stride, padding = given[2:5] + [None, [1, 1], [0, 0]][len(given) - 2 :]
            return [list(given[1].meta["val"].shape[2:]), list(stride), list(padding)]
    return []


def _guard_inputs(gm: GraphModule, inputs: tuple[Any, ...]) -> None:
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, Tensor) and value.dim():
            with gm.graph.inserting_before(_first_after_placeholders(gm.graph)):
                arguments = (node, node.name, list(value.shape[1:]), _window(node))
                checked = gm.graph.call_function(check_input, arguments)
            checked.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(checked, delete_user_cb=lambda user, checked=checked: user is not checked)


def _first_after_placeholders(graph: fx.Graph) -> Node:
    return next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))


def finish(gm: GraphModule) -> GraphModule:
    """Clean up and verify: every pass ends here, so passes need not."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    gm.delete_all_unused_submodules()
    return gm


Pass = Callable[[GraphModule], GraphModule]


@dataclass(frozen=True)
class Pipeline:
    """Passes in a row; itself a pass."""

    passes: tuple[Pass, ...]

    def __call__(self, gm: GraphModule) -> GraphModule:
        for apply in self.passes:
            gm = finish(apply(gm))
        return gm


def is_lowered(gm: GraphModule) -> bool:
    """Whether the graph computes with integers."""
    integer = (ops.linear.default, ops.selective_scan_quantized.default)
    return any(gm.graph.find_nodes(op="call_function", target=target) for target in integer)


def scope(node: Node) -> str:
    """Path of the innermost module that called this node; empty where torch.export recorded none."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def parameter_of(node: Any) -> str | None:
    """Name of the parameter or buffer whose elements this node is, seen through views."""
    while is_view(node):
        node = node.args[0]
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None


def is_view(node: Any) -> bool:
    """Whether a node only selects and arranges elements of its first argument."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in _VIEWS


_VIEWS = {
    operator.getitem,
    aten.alias.default,
    aten.chunk.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.flatten.using_ints,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.narrow.default,
    aten.numpy_T.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
}


def attribute(gm: nn.Module, name: str) -> Any:
    """The parameter, buffer or module at a dotted path."""
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def has_attribute(gm: nn.Module, name: str) -> bool:
    try:
        attribute(gm, name)
    except AttributeError:
        return False
    return True


def set_tensor(gm: nn.Module, name: str, value: Tensor) -> str:
    """Registers a parameter or a buffer at a dotted path, making containers as needed; returns the path."""
    *path, leaf = name.split(".")
    module: nn.Module = gm
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if leaf in module._parameters or leaf in module._buffers:
        delattr(module, leaf)
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)
    return name


class Insertion:
    """Inserts nodes before one node, with the metadata that later passes read."""

    def __init__(self, gm: GraphModule, before: Node) -> None:
        self.gm, self.before = gm, before

    def tensor(self, name: str, value: Tensor) -> Node:
        set_tensor(self.gm, name, value)
        with self.gm.graph.inserting_before(self.before):
            node = self.gm.graph.get_attr(name)
        mode = _fake_mode(self.gm)
        node.meta["val"] = value if mode is None else to_fake(value, mode)
        return self._tag(node)

    def call(self, target: Any, *args: Any) -> Node:
        with self.gm.graph.inserting_before(self.before):
            node = self.gm.graph.call_function(target, args)
        if _fake_mode(self.gm) is not None:
            node.meta["val"] = value_of(self.gm, target, args)
        return self._tag(node)

    def bring(self, *constants: Any) -> None:
        """Moves constants that come later to where they can be read."""
        for constant in constants:
            if isinstance(constant, Node) and self.before < constant:
                self.before.prepend(constant)

    def _tag(self, node: Node) -> Node:
        if "nn_module_stack" in self.before.meta:
            node.meta["nn_module_stack"] = self.before.meta["nn_module_stack"]
        return node


def value_of(gm: GraphModule, target: Any, args: Any, kwargs: Any = None) -> Any:
    """What calling an operator on nodes gives: type and shape, no numbers."""

    def value(node: Node) -> Any:
        # a parameter that a torch pass has put in has none recorded
        return node.meta["val"] if "val" in node.meta or node.op != "get_attr" else attribute(gm, str(node.target))

    mode = _fake_mode(gm)
    arguments, options = fx.map_arg((args, kwargs or {}), value)
    with mode, enable_python_dispatcher(), torch.no_grad():  # operators without gradients refuse parameters otherwise
        return target(*to_fake(arguments, mode), **to_fake(options, mode))


def propagate(gm: GraphModule) -> GraphModule:
    """Every value's type, shape and device, from those recorded of the inputs and constants."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" in node.meta:
            node.meta["val"] = value_of(gm, node.target, node.args, node.kwargs)
    return gm


def follow_device(gm: GraphModule) -> GraphModule:
    """What is recorded of values, where the model was moved to another device since."""
    mode = _fake_mode(gm)
    constants = {node: attribute(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    recorded = {node: node.meta["val"] for node in constants if isinstance(node.meta.get("val"), Tensor)}
    if mode is None or all(value.device == constants[node].device for node, value in recorded.items()):
        return gm
    for node in recorded:
        node.meta["val"] = to_fake(constants[node], mode)
    device = next(iter(gm.state_dict().values())).device
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(value := node.meta.get("val"), Tensor):
            with mode:
                node.meta["val"] = value.to(device)
    return propagate(gm)


def _fake_mode(gm: GraphModule) -> Any:
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)


def to_fake(values: Any, mode: Any) -> Any:
    """The same values, tensors as those of a fake mode, with their shapes fixed."""

    def convert(value: Any) -> Any:
        real = isinstance(value, Tensor) and not hasattr(value, "fake_mode")
        return mode.from_tensor(value, static_shapes=True) if real else value

    return torch.utils._pytree.tree_map(convert, values)


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One canonical linear: x (B, L, D) times a parameter (N, D)."""

    name: str
    """Path of the module whose `weight` it is, such as `layers.0.mixer.in_proj`; of a bare parameter `w`, `w_linear`;
    `name@1` at a second call of one weight."""
    node: Node
    weight: str
    """Path of the weight parameter."""
    tokens: int
    in_features: int
    out_features: int
    block: str | None
    """Path of the block around it; None in the stem, the head, and between the blocks of a stage."""


def find_linears(gm: GraphModule) -> list[LinearSite]:
    """Every `aten.linear` of a parameter on (B, L, D), in graph order."""
    sites: list[LinearSite] = []
    seen: dict[str, int] = {}
    nodes = [node for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default) if on_tokens(node)]
    for node, block in zip(nodes, block_paths(nodes), strict=True):
        weight = str(parameter_of(node.args[1]))
        out_features, in_features = node.args[1].meta["val"].shape
        owner, _, leaf = weight.rpartition(".")
        label = owner if owner and leaf == "weight" else f"{weight}_linear"
        count = seen[label] = seen.get(label, -1) + 1
        name = f"{label}@{count}" if count else label
        tokens = node.args[0].meta["val"].shape[1]
        sites.append(LinearSite(name, node, weight, tokens, in_features, out_features, block))
    return sites


def on_tokens(linear: Node) -> bool:
    """Whether a linear multiplies a parameter with x (B, L, D), where only B is dynamic."""
    shape = linear.args[0].meta["val"].shape  # type: ignore[union-attr]
    static = [isinstance(size, int) for size in shape]
    return parameter_of(linear.args[1]) is not None and static == [False, True, True]


def block_paths(linears: Sequence[Node]) -> list[str | None]:
    """The block around each linear: the innermost numbered module (`layers.3`, `layers.0.blocks.1`).

    None where there is none, and in a stage, which is a numbered module around other linears' blocks (`layers.0`
    around `layers.0.blocks.1`).
    """
    paths = [_numbered(node) for node in linears]
    blocks = {path for path in paths if path is not None}
    stages = {path for path in blocks if any(other.startswith(f"{path}.") for other in blocks)}
    return [None if path in stages else path for path in paths]


def _numbered(node: Node) -> str | None:
    own = scope(node)
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    numbered = [path for path in paths if re.search(r"(^|\.)\d+$", path) and path != own]
    return numbered[-1] if numbered else None
