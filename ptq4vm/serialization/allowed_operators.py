"""Allow-list of the operators that a graph in a file may call, and of the kinds of their arguments.

Allowed are integer arithmetic on sizes, and operators of ptq4vm and aten that compute their result from their
arguments and do nothing else: none that changes an argument, opens a file, or is run for a side effect.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ptq4vm.graph.capture import check_input


class GraphFormatError(ValueError):
    """Raised for a graph that cannot be written, or a description of no graph that may be run."""


_ARITHMETIC = [
    *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "abs", "and_", "or_", "not_"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
]

_PYTHON: dict[str, Callable[..., Any]] = {
    "ptq4vm.check_input": check_input,
    **{f"operator.{name}": getattr(operator, name) for name in _ARITHMETIC},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_sum")
        if hasattr(torch, name)
    },
}
_PYTHON_NAMES = {function: name for name, function in _PYTHON.items()}

_DECOMPOSED = {"quantize_per_tensor", "dequantize_per_tensor", "quantize_per_channel", "dequantize_per_channel"}
_ASSERTIONS = {"_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}


def operator_name(target: Any) -> str:
    """Returns the name under which a file has an operator; raises GraphFormatError for one that is not allowed."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, base = target._schema.name.partition("::")
        name = f"{namespace}::{base}.{target._overloadname}"
        if (reason := _impurity(target, namespace, base)) is not None:
            raise GraphFormatError(f"the operator {name} cannot be written: it {reason}")
        return name
    if target in _PYTHON_NAMES:
        return _PYTHON_NAMES[target]
    raise GraphFormatError(f"a call of {getattr(target, '__qualname__', target)} cannot be written")


def find_operator(name: Any, allowed: Collection[str]) -> Callable[..., Any]:
    """Returns the operator of that name; raises GraphFormatError for one that is not allowed or not defined."""
    if isinstance(name, str) and name in _PYTHON:
        return _PYTHON[name]
    match = re.fullmatch(r"([A-Za-z_]\w*)::([A-Za-z_]\w*)\.(\w+)", name, re.ASCII) if isinstance(name, str) else None
    if match is None:
        raise GraphFormatError(f"{name!r} is not the name of an operator")
    namespace, base, overload = match.groups()
    own = namespace in ("aten", "ptq4vm") or (namespace == "quantized_decomposed" and base in _DECOMPOSED)
    if not own and name not in allowed:
        raise GraphFormatError(
            f"the operator {name} is not one of aten's or ptq4vm's; if you trust it, import what defines it and allow "
            f"it by name: load(folder, operators=[{name!r}])"
        )
    if namespace == "quantized_decomposed":
        _define_decomposed()
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    except (AttributeError, RuntimeError) as error:
        raise GraphFormatError(f"the operator {name} is not defined here: import what defines it") from error
    reason = None if name in allowed else _impurity(found, namespace, base)
    if reason is not None:
        raise GraphFormatError(f"the operator {name} is refused: it {reason}")
    return found


def _define_decomposed() -> None:
    """Imports the module that defines the operators `quantized_decomposed::`."""
    try:
        import torch.ao.quantization.fx._decomposed  # noqa: F401
    except ImportError:
        import torchao.quantization.pt2e  # noqa: F401


def _impurity(found: Any, namespace: str, base: str) -> str | None:
    """Returns how an operator does more than compute its result from its arguments; None if it does not."""
    schema = found._schema
    if not torch._C._dispatch_has_kernel(found.name()):
        return "is not an operator on tensors"
    if schema.is_mutable:
        return "changes its arguments"
    kinds = {str(argument.type) for argument in schema.arguments}
    if "Storage" in kinds or any(argument.name == "filename" for argument in schema.arguments):
        return "reaches files or memory that is not a tensor's"
    if base.startswith("_unsafe_") and base != "_unsafe_view":
        return "does not check its arguments"
    if (not schema.returns and base not in _ASSERTIONS) or (namespace == "ptq4vm" and base.startswith("_")):
        return "is run for a side effect"
    return None


def check_call(target: Any, name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Raises GraphFormatError for arguments that an operator does not take."""
    if isinstance(target, torch._ops.OpOverload):
        _check_arguments(target, arguments, options)
    elif options or (target is not check_input and not all(isinstance(value, _NUMBERS) for value in arguments)):
        raise GraphFormatError(f"{name} takes nodes and numbers, not {shortened((arguments, options))}")


_NUMBERS = (Node, bool, int, float, slice, type(None))

_ACCEPTED: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("Tensor", (bool, int, float, complex)),
    ("number", (bool, int, float, complex)),
    ("int", (bool, int, torch.dtype, torch.layout, torch.memory_format)),
    ("float", (bool, int, float)),
    ("bool", (bool,)),
    ("str", (str,)),
    ("Device", (torch.device,)),
)
"""Python types that a type in a schema accepts, beside nodes; torch shows dtypes, layouts and formats as int."""


@functools.cache
def _kinds(target: Any) -> tuple[tuple[tuple[str, str], ...], dict[str, str]]:
    """Returns names and types of an operator's positional arguments, and of all its arguments."""
    arguments = target._schema.arguments
    placed = tuple((argument.name, str(argument.type)) for argument in arguments if not argument.kwarg_only)
    return placed, {argument.name: str(argument.type) for argument in arguments}


def _check_arguments(target: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Raises GraphFormatError for arguments that are too many, unknown, or of a kind that the schema does not have."""
    placed, known = _kinds(target)
    if len(arguments) > len(placed):
        raise GraphFormatError(f"{target} takes {len(placed)} arguments, not {len(arguments)}")
    for name in options:
        if name not in known:
            raise GraphFormatError(f"{target} has no argument {name}")
    given = [(*argument, value) for argument, value in zip(placed, arguments, strict=False)]
    for name, kind, value in (*given, *((name, known[name], value) for name, value in options.items())):
        if not _fits(kind, value):
            raise GraphFormatError(f"{target} takes {kind} as {name}, not {shortened(value)}")


def _fits(kind: str, value: Any) -> bool:
    if isinstance(value, Node):
        return True
    if isinstance(value, (list, tuple)):
        return "List[" in kind and all(_fits(kind, item) for item in value)
    given: Any = type(value)
    return _accepts(kind, given)


@functools.cache
def _accepts(kind: str, given: Any) -> bool:
    if given is type(None):
        return kind.startswith(("Optional[", "List[Optional["))
    return any(name in kind and issubclass(given, types) for name, types in _ACCEPTED)


def shortened(value: Any) -> str:
    """Returns the repr of a value, in 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
