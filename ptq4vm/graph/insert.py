"""Edits graphs: tensors at dotted paths, nodes with the metadata that later passes read, recorded values."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

aten = torch.ops.aten

PIECE = "ptq4vm.piece"
"""The key of the name of the piece that a node belongs to, in a model without numbered blocks."""


def attribute(gm: nn.Module, name: str) -> Any:
    """The parameter, buffer or module at a dotted path."""
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def module_of(gm: nn.Module, node: object) -> nn.Module | None:
    """Returns the module that a node calls; None for any other node or value."""
    return gm.get_submodule(str(node.target)) if isinstance(node, Node) and node.op == "call_module" else None


def arguments(node: Node) -> tuple[Any, ...]:
    """All arguments of an operator in the order of its schema, with the defaults of those left out."""
    target: Any = node.target
    given = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False)) | node.kwargs
    return tuple(given.get(argument.name, argument.default_value) for argument in target._schema.arguments)


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


def replace_node(old: Node, new: Node) -> None:
    """Gives `new` the readers and, where it has none of its own, the metadata of `old`, and erases `old`."""
    for key in ("val", "nn_module_stack"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


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

    def move_before(self, *constants: Any) -> None:
        """Moves constants that come later to where they can be read."""
        for constant in constants:
            if isinstance(constant, Node) and self.before < constant:
                self.before.prepend(constant)

    def _tag(self, node: Node) -> Node:
        node.meta.update({key: self.before.meta[key] for key in ("nn_module_stack", PIECE) if key in self.before.meta})
        return node


def value_of(gm: GraphModule, target: Any, args: Any, kwargs: Any = None) -> Any:
    """Returns the fake result of an operator on nodes: type and shape, no numbers."""

    def value(node: Node) -> Any:
        # a parameter that a torch pass has put in has none recorded
        return node.meta["val"] if "val" in node.meta or node.op != "get_attr" else attribute(gm, str(node.target))

    mode = _fake_mode(gm)
    arguments, options = fx.map_arg((args, kwargs or {}), value)
    with mode, enable_python_dispatcher(), torch.no_grad():  # operators without gradients refuse parameters otherwise
        if target is aten.linear.default:  # torch takes it apart into a dozen operators, to find this
            x, weight = to_fake(arguments[:2], mode)
            return x.new_empty((*x.shape[:-1], weight.shape[0]))
        return target(*to_fake(arguments, mode), **to_fake(options, mode))


def propagate(gm: GraphModule) -> GraphModule:
    """Every value's type, shape and device, from those recorded of the inputs and constants."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" in node.meta:
            node.meta["val"] = value_of(gm, node.target, node.args, node.kwargs)
    return gm


def follow_device(gm: GraphModule) -> GraphModule:
    """Renews the recorded values of a model that was moved to another device."""
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
    """Returns the values with tensors as those of a fake mode, their shapes fixed."""

    def convert(value: Any) -> Any:
        real = isinstance(value, Tensor) and not hasattr(value, "fake_mode")
        return mode.from_tensor(value, static_shapes=True) if real else value

    return torch.utils._pytree.tree_map(convert, values)
