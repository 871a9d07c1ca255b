"""Idioms that torch.export refuses and that change nothing are followed while a model is captured once more.

`B = int(windows.shape[0] / (H * W / ws / ws))` is a size of the batch for every batch, where its quotients are exact:
the stand-ins here return that size. The names `int`, `float` and `len` are replaced in the user's modules alone, and
only in those where such a call has stopped a capture; everything is restored afterwards.
"""

import builtins
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ptq4vm.authors.context import devices_of_cpus
from ptq4vm.graph.specializations import replaced

Number = int | float | torch.SymInt | torch.SymFloat


@contextlib.contextmanager
def followed(model: nn.Module, namespaces: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Follows the harmless idioms while `model` is captured; `namespaces` are globals of the user's functions."""
    sizes = _Sizes()
    with contextlib.ExitStack() as stack:
        handle = model.register_forward_pre_hook(sizes.read, with_kwargs=True)
        stack.callback(handle.remove)
        for name, rounding in _ROUNDINGS.items():
            stack.enter_context(replaced(torch.SymFloat, name, _rounded(sizes, name, rounding)))
        stack.enter_context(devices_of_cpus())
        stack.enter_context(replaced(Tensor, "data", property(_data, _set_data)))
        for namespace in namespaces:
            stack.enter_context(_shadowed(namespace, _stand_ins(sizes)))
        yield


class _Sizes:
    """The symbolic sizes of the inputs, by their symbol."""

    def __init__(self) -> None:
        self._known: dict[Any, torch.SymInt] = {}

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        sizes: list[Any] = [size for tensor in tensors for size in tensor.shape]
        self._known.update({size.node.expr: size for size in sizes if isinstance(size, torch.SymInt)})

    def quotient(self, value: torch.SymFloat, positive: bool = False) -> tuple[Number, int] | None:
        """Returns integers p and q with value = p / q for every batch; None where floats may round on the way.

        With `positive` also where p / q is a fraction that may be negative.
        """
        try:
            p, q = sympy.cancel(_exact(value.node.expr)).as_numer_denom()
            p = sympy.expand(p)
            signs = [term.as_coeff_Mul()[0] for term in sympy.Add.make_args(p)]
            if not q.is_Integer or (positive and q != 1 and min(signs) < 0):
                return None
            return self._computed(p), int(q)
        except _InexactError:
            return None

    def _computed(self, expression: Any) -> Number:
        """Returns a polynomial with integer coefficients as arithmetic on the sizes, which the graph records."""
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol and expression in self._known:
            return self._known[expression]
        if expression.is_Pow and expression.exp.is_Integer and expression.exp > 0:
            return math.prod([self._computed(expression.base)] * int(expression.exp))
        if expression.is_Add or expression.is_Mul:
            first, *rest = (self._computed(each) for each in expression.args)
            for each in rest:
                first = first + each if expression.is_Add else first * each
            return first
        raise _InexactError


class _InexactError(Exception):
    """Floating point may have rounded, or the expression is no quotient of sizes."""


def _exact(expression: Any) -> Any:
    """Returns an expression of floats as a quotient of polynomials of the sizes.

    Every intermediate value must be one that floats hold for all sizes: none has been rounded then.
    """
    if expression.is_Symbol or expression.is_Integer:
        return expression
    if expression.is_Float:
        return sympy.Rational(*float(expression).as_integer_ratio())
    parts = [_exact(each) for each in expression.args]
    kind = type(expression).__name__
    if kind == "ToFloat":
        return parts[0]
    if kind in ("IntTrueDiv", "FloatTrueDiv"):
        return _representable(parts[0] / parts[1])
    if kind in ("FloorDiv", "CleanDiv"):
        quotient = sympy.cancel(parts[0] / parts[1])
        if quotient.as_numer_denom()[1] == 1:
            return quotient
    elif expression.is_Add or expression.is_Mul or expression.is_Pow:
        return _representable(expression.func(*parts))
    raise _InexactError


def _representable(value: Any) -> Any:
    """Returns a value, if floats hold it for all batches to 2²¹: integers below 2⁵³, over a power of two."""
    p, q = sympy.cancel(value).as_numer_denom()
    terms = [term.as_coeff_Mul()[0] for term in sympy.Add.make_args(sympy.expand(p))]
    if not q.is_Integer or int(q).bit_count() != 1 or any(abs(term) >= 2**32 for term in terms):
        raise _InexactError
    return value


def _floor(p: Number, q: int) -> Number:
    return p // q


def _ceil(p: Number, q: int) -> Number:
    return -(-p // q)


def _whole(p: Number, q: int) -> Number | None:
    return p if q == 1 else None


_ROUNDINGS: Mapping[str, Callable[[Number, int], Number | None]] = {
    "__floor__": _floor,
    "__trunc__": _floor,
    "__ceil__": _ceil,
    "__round__": _whole,
}


def _rounded(sizes: _Sizes, name: str, rounding: Callable[[Number, int], Number | None]) -> Callable[..., Any]:
    original = getattr(torch.SymFloat, name)

    def method(value: torch.SymFloat, *digits: int) -> Any:
        found = None if digits else sizes.quotient(value, positive=name == "__trunc__")
        result = None if found is None else rounding(*found)
        return original(value, *digits) if result is None else result

    return method


def _stand_ins(sizes: _Sizes) -> dict[str, Any]:
    """Returns what `int`, `float` and `len` are meanwhile: themselves for everything but sizes of the batch."""

    def to_int(value: Any) -> Any:
        inexact = isinstance(value, torch.SymFloat) and sizes.quotient(value, positive=True) is None
        return builtins.int(value) if inexact else torch.sym_int(value)

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.dim() else builtins.len(value)

    return {"int": _number(builtins.int, to_int), "float": _number(builtins.float, torch.sym_float), "len": length}


def _number(kind: type, convert: Callable[[Any], Any]) -> type:
    """Returns a type that is `kind` in `isinstance`, and whose calls convert symbolic numbers by `convert`."""

    class Meta(type):
        def __call__(cls, *args: Any, **options: Any) -> Any:
            if len(args) == 1 and not options and isinstance(args[0], (torch.SymInt, torch.SymFloat)):
                return convert(args[0])
            return kind(*args, **options)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, kind)

        def __subclasscheck__(cls, value: type) -> bool:
            return issubclass(value, kind)

        def __eq__(cls, other: object) -> bool:
            return other is cls or other is kind

        def __hash__(cls) -> int:
            return hash(kind)

    return Meta(kind.__name__, (kind,), {})


@contextlib.contextmanager
def _shadowed(namespace: dict[str, Any], stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Puts names into the globals of a module that has none of its own under them."""
    added = {name: value for name, value in stand_ins.items() if name not in namespace}
    namespace.update(added)
    try:
        yield
    finally:
        for name, value in added.items():
            if namespace.get(name) is value:
                del namespace[name]


_plain_data: Any = torch._C.TensorBase.data


def _data(tensor: Tensor) -> Tensor:
    """`x.data` is a tensor that nobody can trace; `x.detach()` is the same one and can be."""
    return tensor.detach() if is_fake(tensor) else _plain_data.__get__(tensor)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    _plain_data.__set__(tensor, value)
