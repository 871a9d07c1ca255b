"""Arguments, structures and names of a graph as JSON.

Only the kinds below can be written or read; every other kind is refused by name.
"""

import contextlib
import keyword
import math
from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from ptq4vm.serialization.allowed_operators import GraphFormatError, shortened


def encode(value: Any) -> Any:
    """Returns a node's argument as JSON; raises GraphFormatError for a kind that has no form here."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
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


def decode(value: Any, nodes: Mapping[str, Node]) -> Any:
    """Undoes `encode`; raises GraphFormatError for anything that `encode` does not write."""
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
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise GraphFormatError(f"{shortened(value)} is no argument")
    ((kind, content),) = value.items()
    if kind == "node":
        if isinstance(content, str) and content in nodes:
            return nodes[content]
        raise GraphFormatError(f"{shortened(content)} is read before it is computed")
    if kind in _TORCH_KINDS:
        return torch_value(kind, content)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    items = content if isinstance(content, list) else None
    if kind == "tuple" and items is not None:
        return tuple(decode(item, nodes) for item in items)
    if kind == "slice" and items is not None and len(items) == 3:
        return slice(*(decode(item, nodes) for item in items))
    if kind == "complex" and items is not None and len(items) == 2:
        return complex(*(float(decode(item, nodes)) for item in items))
    if kind == "dict" and items is not None and all(isinstance(item, list) and len(item) == 2 for item in items):
        return {_key(key): decode(item, nodes) for key, item in items}
    raise GraphFormatError(f"{shortened(value)} is no argument")


def torch_value(kind: str, name: Any) -> Any:
    """Returns a dtype, layout or memory format of torch, or a device."""
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


def encode_structure(spec: Any) -> Any:
    """Returns the pytree of inputs or outputs as JSON: null for a leaf, else its kind and its children.

    A mapping of an unknown class becomes a dict.
    """
    if spec.is_leaf():
        return None
    kind, context = spec.type, spec.context
    entry: dict[str, Any] = {"kind": kind.__name__, "items": [encode_structure(child) for child in spec.children()]}
    if kind in (list, tuple):
        return entry
    if kind is namedtuple:  # the type of every named tuple in a pytree; the class is the context
        return entry | {"name": context.__name__, "keys": list(context._fields)}
    names = list(context) if isinstance(context, (list, tuple)) else []
    if len(names) == len(entry["items"]) and all(isinstance(name, (str, int)) for name in names):
        return entry | {"kind": "OrderedDict" if kind is OrderedDict else "dict", "keys": names}
    raise GraphFormatError(
        f"inputs or outputs in a {kind.__name__} cannot be written: let the model return tensors, or tuples, lists, "
        "dictionaries and named tuples of them"
    )


def decode_structure(value: Any) -> Any:
    """Undoes `encode_structure`: an object of that structure, with True for every leaf."""
    if value is None:
        return True
    kind, items = value["kind"], [decode_structure(child) for child in value["items"]]
    if kind in ("list", "tuple"):
        return items if kind == "list" else tuple(items)
    keys = value["keys"]
    if kind in ("dict", "OrderedDict"):
        pairs = zip(map(_key, keys), items, strict=True)
        return OrderedDict(pairs) if kind == "OrderedDict" else dict(pairs)
    if kind == "namedtuple":
        for name in (value["name"], *keys):
            identifier(name, "a name of a tuple")
        return namedtuple(value["name"], keys)(*items)
    raise GraphFormatError(f"{shortened(value)} is no structure of inputs or outputs")


def identifier(name: Any, what: str) -> str:
    """Returns a name if it may stand in the code that torch.fx makes of a graph; else raises GraphFormatError."""
    if isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name):
        return name
    raise GraphFormatError(f"{shortened(name)} cannot be {what}")


def check_tensor_name(name: Any) -> str:
    """Returns the path of a tensor if it may stand between double quotes in code; else raises GraphFormatError."""
    if isinstance(name, str) and all(name.split(".")) and name.isprintable() and not set(name) & set('"\\'):
        return name
    raise GraphFormatError(f"{shortened(name)} cannot be the name of a tensor")
