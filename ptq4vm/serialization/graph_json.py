"""Writes a graph as JSON and reads it: nodes, operators by qualified name, arguments, inputs, structures.

    {"name": "Vim", "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 224, 224]}],
     "nodes": [{"name": "x", "input": 0}, {"name": "w", "tensor": "layers.0.in_proj.weight_q"},
               {"name": "y", "call": "aten::relu.default", "args": [{"node": "x"}]}], "output": {"node": "y"}, …}

Reading runs no code that a file names: an operator is called only if it is in the allow-list (`operators`) or the
caller allows it by name, and an argument is of one of the few kinds in `json_values`. Everything else in a file is
refused by name.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ptq4vm.graph.insert import attribute, has_attribute
from ptq4vm.serialization.allowed_operators import GraphFormatError, check_call, find_operator, operator_name, shortened
from ptq4vm.serialization.json_values import (
    check_tensor_name,
    decode,
    decode_structure,
    encode,
    encode_structure,
    identifier,
    torch_value,
)
from ptq4vm.serialization.recorded_values import RECORDED

BATCH = "batch"
"""Size of a dynamic axis in `inputs`."""


def describe(gm: GraphModule) -> dict[str, Any]:
    """Returns a graph as JSON values, without its tensors.

    Raises GraphFormatError, which names the node, for anything that a file cannot hold.
    """
    stacks: dict[tuple[tuple[str, str], ...], int] = {}
    nodes, output = [], None
    for node in gm.graph.nodes:
        if node.op == "output":
            output = node.args[0]
            continue
        try:
            entry = {"name": identifier(node.name, "the name of a node"), **_describe_node(node)}
        except GraphFormatError as error:
            raise GraphFormatError(f"{node.name}: {error}") from None
        if stack := _stack_of(node):
            entry["scope"] = stacks.setdefault(stack, len(stacks))
        nodes.append(entry)
    signature = _signature(gm)
    return {
        "name": re.sub(r"\W", "_", type(gm).__name__, flags=re.ASCII),
        "arguments": list(signature.orig_args),
        "input_structure": encode_structure(signature.in_spec),
        "output_structure": encode_structure(signature.out_spec),
        "inputs": [_describe_input(node) for node in gm.graph.find_nodes(op="placeholder")],
        "scopes": [[list(level) for level in stack] for stack in stacks],
        "nodes": nodes,
        "output": encode(output),
    }


def _describe_node(node: Node) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"input": identifier(node.target, "the name of an input")}
    if node.op == "get_attr":
        return {"tensor": check_tensor_name(node.target)}
    if node.op != "call_function":
        raise GraphFormatError(f"a call of the module or method {node.target} cannot be written")
    entry: dict[str, Any] = {"call": operator_name(node.target)}
    if node.args:
        entry["args"] = [encode(value) for value in node.args]
    if node.kwargs:
        entry["kwargs"] = {name: encode(value) for name, value in node.kwargs.items()}
    return entry


def _stack_of(node: Node) -> tuple[tuple[str, str], ...]:
    """Returns path and class of the modules around a node, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return tuple((path, kind if isinstance(kind, str) else kind.__qualname__) for path, kind in stack)


def _signature(gm: GraphModule) -> _PyTreeInfo:
    """Returns the names of the arguments, and the structures of inputs and outputs."""
    codegen = gm.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen) or codegen.pytree_info.out_spec is None:
        raise GraphFormatError("a graph without a signature cannot be written; ptq4vm.prepare makes one with")
    return codegen.pytree_info


def _describe_input(node: Node) -> dict[str, Any]:
    value = node.meta.get("val")
    dtype, shape = node.meta.get(RECORDED, (None, ()))
    if isinstance(value, Tensor):
        dtype, shape = value.dtype, tuple(size if isinstance(size, int) else BATCH for size in value.shape)
    if dtype is None:
        return {"name": node.name, "value": encode(value)}
    return {"name": node.name, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}


def build(description: Any, root: nn.Module, operators: Collection[str] = ()) -> tuple[fx.Graph, str]:
    """Builds the graph that `describe` was given, and returns it with the name of its class.

    The graph reads the tensors of `root`. `operators` are allowed beside those of ptq4vm and aten. A file records only
    dtypes and shapes of the inputs; `values.with_values` works out the others. Raises GraphFormatError for a graph that
    may not be run, and any of the errors that `content` turns into "corrupt" where there is no description of a graph.
    """
    graph = fx.Graph()
    nodes: dict[str, Node] = {}
    stacks = [_stack(levels) for levels in description["scopes"]]
    inputs = iter(description["inputs"])
    find = functools.cache(functools.partial(find_operator, allowed=operators))
    for entry in description["nodes"]:
        name = identifier(entry["name"], "the name of a node")
        if name in nodes:
            raise GraphFormatError(f"two nodes are called {name}")
        try:
            node = _build_node(graph, name, entry, nodes, root, find)
        except GraphFormatError as error:
            raise GraphFormatError(f"{name}: {error}") from None
        if node.name != name:
            raise GraphFormatError(f"{name} cannot be the name of a node")
        if node.op == "placeholder":
            node.meta |= _input(next(inputs), name)
        if "scope" in entry:
            node.meta["nn_module_stack"] = stacks[entry["scope"]]
        nodes[name] = node
    graph.output(decode(description["output"], nodes))
    _set_signature(graph, description)
    return graph, identifier(description["name"], "the name of a model")


def _build_node(
    graph: fx.Graph,
    name: str,
    entry: Mapping[str, Any],
    nodes: Mapping[str, Node],
    root: nn.Module,
    find: Callable[[Any], Callable[..., Any]],
) -> Node:
    if "input" in entry:
        return graph.create_node("placeholder", identifier(entry["input"], "the name of an input"), name=name)
    if "tensor" in entry:
        path = check_tensor_name(entry["tensor"])
        if not (has_attribute(root, path) and isinstance(attribute(root, path), Tensor)):
            raise GraphFormatError(f"there is no tensor {path}")
        return graph.create_node("get_attr", path, name=name)
    called = entry["call"]
    target = find(called)
    arguments = [decode(value, nodes) for value in entry.get("args", [])]
    options = {
        identifier(key, "the name of an argument"): decode(value, nodes)
        for key, value in entry.get("kwargs", {}).items()
    }
    check_call(target, called, arguments, options)
    return graph.create_node("call_function", target, tuple(arguments), options, name=name)


def _stack(levels: Any) -> dict[str, tuple[str, str]]:
    if all(isinstance(part, str) for level in levels for part in level):
        return {str(depth): (path, kind) for depth, (path, kind) in enumerate(levels)}
    raise GraphFormatError(f"{shortened(levels)} are no modules")


def _input(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    if entry["name"] != name:
        raise GraphFormatError(f"the inputs are not in order: {shortened(entry['name'])} where {name} is read")
    if "shape" not in entry:
        return {"val": decode(entry["value"], {})}
    shape = entry["shape"]
    if not all(size == BATCH or (type(size) is int and 0 <= size < 2**31) for size in shape):
        raise GraphFormatError(f"{name}: {shortened(shape)} is no shape of an input")
    return {RECORDED: (torch_value("dtype", entry["dtype"]), tuple(shape))}


def _set_signature(graph: fx.Graph, description: Mapping[str, Any]) -> None:
    names = [identifier(name, "the name of an argument") for name in description["arguments"]]
    given = pytree.tree_structure(decode_structure(description["input_structure"]))
    returned = pytree.tree_structure(decode_structure(description["output_structure"]))
    result = graph.output_node().args[0]
    outputs = 1 if isinstance(result, Node) or not isinstance(result, (list, tuple)) else len(result)
    have = given.num_leaves, len(names), returned.num_leaves
    want = len(graph.find_nodes(op="placeholder")), given.children()[0].num_children, outputs
    if have[0] != want[0] or have[2] != want[2] or have[1] < want[1]:
        raise GraphFormatError(f"inputs, names and outputs are {have}, the graph has {want}")
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, given, returned)))
