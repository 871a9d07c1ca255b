"""A graph as plain JSON: nodes, operators by their qualified names, arguments, inputs, and the output's structure.

    {"name": "Vim", "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 224, 224]}],
     "nodes": [{"name": "x", "input": 0}, {"name": "w", "tensor": "layers.0.in_proj.weight_q"},
               {"name": "y", "call": "aten::relu.default", "args": [{"node": "x"}]}], "output": {"node": "y"}, …}

Reading runs no code that a file names: an operator is called only if it is in the allow-list (`graph_operators`) or the
caller allows it by name, and an argument is of one of the few kinds that `_encode` writes. Whatever else a file holds
is refused by name.
"""

from __future__ import annotations

import contextlib
import keyword
import math
import re
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ptq4vm.graph.insert import attribute, has_attribute
from ptq4vm.serialization.operators import GraphFormatError, check_call, find_operator, operator_name, shortened
from ptq4vm.serialization.values import RECORDED

BATCH = "batch"
"""The size of an input's first axis in `inputs`."""


# --- arguments ---


def _encode(value: Any) -> Any:
    """A node's argument; raises GraphFormatError for a kind that has no form here."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [_encode(value.real), _encode(value.imag)]}
    for name, kind in _TORCH_KINDS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise GraphFormatError(f"an argument of type {type(value).__name__} cannot be written")


_TORCH_KINDS: dict[str, Any] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
    "device": torch.device,
}
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _decode(value: Any, nodes: Mapping[str, Node]) -> Any:
    """What `_encode` was given; raises GraphFormatError for anything that it does not write."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, str):
        if len(value) > 1000:
            raise GraphFormatError(f"an argument is a text of {len(value)} characters")
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise GraphFormatError(f"the argument {value} has more than 64 bits")
        return value
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise GraphFormatError(f"{shortened(value)} is no argument")
    ((kind, content),) = value.items()
    if kind == "node":
        return _node(content, nodes)
    if kind in _TORCH_KINDS:
        return _torch_value(kind, content)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    items = content if isinstance(content, list) else None
    if kind == "tuple" and items is not None:
        return tuple(_decode(item, nodes) for item in items)
    if kind == "slice" and items is not None and len(items) == 3:
        return slice(*(_decode(item, nodes) for item in items))
    if kind == "complex" and items is not None and len(items) == 2:
        return complex(*(float(_decode(item, nodes)) for item in items))
    if kind == "dict" and items is not None and all(isinstance(item, list) and len(item) == 2 for item in items):
        return {_key(key): _decode(item, nodes) for key, item in items}
    raise GraphFormatError(f"{shortened(value)} is no argument")


def _node(name: Any, nodes: Mapping[str, Node]) -> Node:
    if not isinstance(name, str) or name not in nodes:
        raise GraphFormatError(f"{shortened(name)} is read before it is computed")
    return nodes[name]


def _torch_value(kind: str, name: Any) -> Any:
    """A dtype, layout or memory format of torch, or a device."""
    if kind == "device":
        if isinstance(name, str) and name.partition(":")[0] in _DEVICES:
            with contextlib.suppress(RuntimeError):
                return torch.device(name)
    elif isinstance(name, str) and isinstance(found := getattr(torch, name, None), _TORCH_KINDS[kind]):
        return found
    raise GraphFormatError(f"{shortened(name)} is no {kind}")


def _key(value: Any) -> Any:
    if isinstance(value, (bool, str, int)):
        return value
    raise GraphFormatError(f"{shortened(value)} is no key of a dictionary")


# --- structures of inputs and outputs ---


def _encode_structure(spec: Any) -> Any:
    """A pytree: null for a leaf, else its kind and its children. A mapping of an unknown class becomes a dict."""
    if spec.is_leaf():
        return None
    kind, context = spec.type, spec.context
    entry: dict[str, Any] = {"kind": kind.__name__, "items": [_encode_structure(child) for child in spec.children()]}
    if kind in (list, tuple):
        return entry
    if kind is namedtuple:  # pytree's mark of all of them; the class is the context
        return entry | {"name": context.__name__, "keys": list(context._fields)}
    names = list(context) if isinstance(context, (list, tuple)) else []
    if len(names) == len(entry["items"]) and all(isinstance(name, (str, int)) for name in names):
        return entry | {"kind": "OrderedDict" if kind is OrderedDict else "dict", "keys": names}
    raise GraphFormatError(
        f"inputs or outputs in a {kind.__name__} cannot be written: let the model return tensors, or tuples, lists, "
        "dictionaries and named tuples of them"
    )


def _decode_structure(value: Any) -> Any:
    """An object of that structure, with True for every leaf."""
    if value is None:
        return True
    kind, items = value["kind"], [_decode_structure(child) for child in value["items"]]
    if kind in ("list", "tuple"):
        return items if kind == "list" else tuple(items)
    keys = value["keys"]
    if kind in ("dict", "OrderedDict"):
        pairs = zip(map(_key, keys), items, strict=True)
        return OrderedDict(pairs) if kind == "OrderedDict" else dict(pairs)
    if kind == "namedtuple":
        for name in (value["name"], *keys):
            _identifier(name, "a name of a tuple")
        return namedtuple(value["name"], keys)(*items)
    raise GraphFormatError(f"{shortened(value)} is no structure of inputs or outputs")


# --- names ---


def _identifier(name: Any, what: str) -> str:
    """A name that may stand in the code that torch.fx makes of a graph."""
    if isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name):
        return name
    raise GraphFormatError(f"{shortened(name)} cannot be {what}")


def check_tensor_name(name: Any) -> str:
    """The path of a tensor, if torch.fx can write it into code, where it may stand between double quotes."""
    if isinstance(name, str) and all(name.split(".")) and name.isprintable() and not set(name) & set('"\\'):
        return name
    raise GraphFormatError(f"{shortened(name)} cannot be the name of a tensor")


# --- graphs ---


def describe(gm: GraphModule) -> dict[str, Any]:
    """The graph of `gm` as values that JSON has; its tensors apart.

    Raises GraphFormatError, which names the node, where it has something that a file cannot hold.
    """
    stacks: dict[tuple[tuple[str, str], ...], int] = {}
    nodes, output = [], None
    for node in gm.graph.nodes:
        if node.op == "output":
            output = node.args[0]
            continue
        try:
            entry = {"name": _identifier(node.name, "the name of a node"), **_describe_node(node)}
        except GraphFormatError as error:
            raise GraphFormatError(f"{node.name}: {error}") from None
        if stack := _stack_of(node):
            entry["scope"] = stacks.setdefault(stack, len(stacks))
        nodes.append(entry)
    signature = _signature(gm)
    return {
        "name": re.sub(r"\W", "_", type(gm).__name__, flags=re.ASCII),
        "arguments": list(signature.orig_args),
        "input_structure": _encode_structure(signature.in_spec),
        "output_structure": _encode_structure(signature.out_spec),
        "inputs": [_describe_input(node) for node in gm.graph.find_nodes(op="placeholder")],
        "scopes": [[list(level) for level in stack] for stack in stacks],
        "nodes": nodes,
        "output": _encode(output),
    }


def _describe_node(node: Node) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"input": _identifier(node.target, "the name of an input")}
    if node.op == "get_attr":
        return {"tensor": check_tensor_name(node.target)}
    if node.op != "call_function":
        raise GraphFormatError(f"a call of the module or method {node.target} cannot be written")
    entry: dict[str, Any] = {"call": operator_name(node.target)}
    if node.args:
        entry["args"] = [_encode(value) for value in node.args]
    if node.kwargs:
        entry["kwargs"] = {name: _encode(value) for name, value in node.kwargs.items()}
    return entry


def _stack_of(node: Node) -> tuple[tuple[str, str], ...]:
    """Path and class of the modules around a node, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return tuple((path, kind if isinstance(kind, str) else kind.__qualname__) for path, kind in stack)


def _signature(gm: GraphModule) -> _PyTreeInfo:
    """The names of the arguments, and the structures of inputs and output."""
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
        return {"name": node.name, "value": _encode(value)}
    return {"name": node.name, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}


def build(description: Any, root: nn.Module, operators: Collection[str] = ()) -> tuple[fx.Graph, str]:
    """The graph that `describe` was given, on the tensors that `root` has, and its class's name.

    `operators` are allowed besides ours and aten's.

    Of values only the inputs' dtypes and shapes are recorded; `graph_values.with_values` works out the others.
    Raises GraphFormatError.
    """
    with _refusing(description):
        return _build(description, root, frozenset(operators))


@contextlib.contextmanager
def _refusing(description: Any) -> Iterator[None]:
    """Whatever is wrong with a description is a GraphFormatError."""
    try:
        yield
    except GraphFormatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise GraphFormatError(f"it describes no graph ({type(error).__name__}: {str(error)[:200]})") from error


def _build(description: Any, root: nn.Module, allowed: frozenset[str]) -> tuple[fx.Graph, str]:
    graph = fx.Graph()
    nodes: dict[str, Node] = {}
    stacks = [_stack(levels) for levels in description["scopes"]]
    inputs = iter(description["inputs"])
    targets: dict[Any, Callable[..., Any]] = {}
    for entry in description["nodes"]:
        name = _identifier(entry["name"], "the name of a node")
        if name in nodes:
            raise GraphFormatError(f"two nodes are called {name}")
        try:
            node = _build_node(graph, name, entry, nodes, root, allowed, targets)
        except GraphFormatError as error:
            raise GraphFormatError(f"{name}: {error}") from None
        if node.name != name:
            raise GraphFormatError(f"{name} cannot be the name of a node")
        if node.op == "placeholder":
            node.meta |= _input(next(inputs), name)
        if "scope" in entry:
            node.meta["nn_module_stack"] = stacks[entry["scope"]]
        nodes[name] = node
    graph.output(_decode(description["output"], nodes))
    _set_signature(graph, description)
    return graph, _identifier(description["name"], "the name of a model")


def _build_node(
    graph: fx.Graph,
    name: str,
    entry: Mapping[str, Any],
    nodes: Mapping[str, Node],
    root: nn.Module,
    allowed: frozenset[str],
    targets: dict[Any, Callable[..., Any]],
) -> Node:
    if "input" in entry:
        return graph.create_node("placeholder", _identifier(entry["input"], "the name of an input"), name=name)
    if "tensor" in entry:
        path = check_tensor_name(entry["tensor"])
        if not (has_attribute(root, path) and isinstance(attribute(root, path), Tensor)):
            raise GraphFormatError(f"there is no tensor {path}")
        return graph.create_node("get_attr", path, name=name)
    called = entry["call"]
    if called not in targets:
        targets[called] = find_operator(called, allowed)
    target = targets[called]
    arguments = [_decode(value, nodes) for value in entry.get("args", [])]
    options = {
        _identifier(key, "the name of an argument"): _decode(value, nodes)
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
        return {"val": _decode(entry["value"], {})}
    shape = entry["shape"]
    if not all(size == BATCH or (type(size) is int and 0 <= size < 2**31) for size in shape):
        raise GraphFormatError(f"{name}: {shortened(shape)} is no shape of an input")
    return {RECORDED: (_torch_value("dtype", entry["dtype"]), tuple(shape))}


def _set_signature(graph: fx.Graph, description: Mapping[str, Any]) -> None:
    names = [_identifier(name, "the name of an argument") for name in description["arguments"]]
    given = pytree.tree_structure(_decode_structure(description["input_structure"]))
    returned = pytree.tree_structure(_decode_structure(description["output_structure"]))
    result = graph.output_node().args[0]
    outputs = 1 if isinstance(result, Node) or not isinstance(result, (list, tuple)) else len(result)
    have = given.num_leaves, len(names), returned.num_leaves
    want = len(graph.find_nodes(op="placeholder")), given.children()[0].num_children, outputs
    if have[0] != want[0] or have[2] != want[2] or have[1] < want[1]:
        raise GraphFormatError(f"inputs, names and outputs are {have}, the graph has {want}")
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, given, returned)))
