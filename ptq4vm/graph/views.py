"""Views, and what lies behind them: parameters, and the module that called a node."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from ptq4vm.graph.insert import aten, attribute


def scope(node: Node) -> str:
    """Path of the innermost module that called this node; empty where torch.export recorded none."""
    return (module_paths(node) or [""])[-1]


def module_paths(node: Node) -> list[str]:
    """Paths of the modules that were being called where this node was made, from the outermost on."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def parameter_of(node: Any) -> str | None:
    """Name of the parameter or buffer whose elements this node is, seen through views and repetitions."""
    root = root_of(node)
    return str(root.target) if isinstance(root, Node) and root.op == "get_attr" else None


def root_of(node: Any) -> Any:
    """Returns the value behind a chain of views and repetitions."""
    while shows_elements(node):
        node = node.args[0]
    return node


def elements_of(view: Any, tensor: Any) -> Any:
    """Returns the elements of a tensor that a chain of views and repetitions shows, for two images."""
    if not shows_elements(view):
        return tensor
    constants = {node: constant_of(node) for node in indices_of(view)}
    arguments = map_arg(view.args[1:], lambda node: constants.get(node, 2))
    return view.target(elements_of(view.args[0], tensor), *arguments, **view.kwargs)


def shows_elements(node: Any) -> bool:
    """Returns whether a node holds nothing but elements of its first argument, some of them more than once."""
    return is_view(node) or is_repetition(node)


def is_repetition(node: Any) -> bool:
    return isinstance(node, Node) and node.target in (aten.expand.default, aten.repeat.default)


def is_view(node: Any) -> bool:
    """Returns whether a node only selects and arranges elements of its first argument."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    indices = indices_of(node)
    return node.target in _VIEWS or (bool(indices) and all(constant_of(index) is not None for index in indices))


def indices_of(node: Node) -> list[Any]:
    """Returns the tensors by which a node selects elements of its first argument."""
    if node.target is aten.index.Tensor:
        found: Any = node.args[1]
        return [value for value in found if value is not None]
    return [node.args[2]] if node.target is aten.index_select.default else []


def constant_of(index: Any) -> Tensor | None:
    """Returns the value of an index that is a constant of the graph; None of any other, and of a mask."""
    if not isinstance(index, Node) or index.op != "get_attr" or index.graph.owning_module is None:
        return None
    value = attribute(index.graph.owning_module, str(index.target))
    return None if value.dtype is torch.bool else value


_VIEWS = {
    operator.getitem,
    aten.adjoint.default,
    aten.alias.default,
    aten.atleast_3d.default,
    aten.channel_shuffle.default,
    aten.chunk.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.diagonal.default,
    aten.dsplit.int,
    aten.flatten.using_ints,
    aten.hsplit.int,
    aten.mH.default,
    aten.mT.default,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.narrow.default,
    aten.narrow_copy.default,
    aten.numpy_T.default,
    aten.permute.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.t.default,
    aten.tensor_split.sections,
    aten.transpose.int,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unfold.default,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unsqueeze.default,
    aten.view.default,
    aten.vsplit.int,
}


_FACTORS = {aten.dropout.default, aten.mul.Tensor}


def writes_stream(node: Node) -> bool:
    """Returns whether a value is added to another that depends on the input, as it is or times a factor."""
    for user in node.users:
        if (is_view(user) or user.target in _FACTORS) and writes_stream(user):
            return True
        if user.target is aten.add.Tensor and all(map(_has_batch, user.args)):
            return True
    return False


def _has_batch(value: Any) -> bool:
    """Returns whether a value differs from image to image: an axis of it is not fixed."""
    shape = value.meta["val"].shape if isinstance(value, Node) else ()
    return not all(isinstance(size, int) for size in shape)
