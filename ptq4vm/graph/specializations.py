"""Records where, while a model is captured, a size of the batch was turned into a number or decided a branch."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ptq4vm.graph.user_code import Place, UserCode

PATCHING = threading.RLock()
"""Held while a method of torch is replaced: two captures at once would restore one another's."""


@dataclass(frozen=True)
class Specialization:
    """A value that torch took for every batch, computed from the batch."""

    expression: Any
    """Of sympy."""
    value: bool | int | float
    place: Place


class Specializations:
    """What was found during one capture, in order."""

    def __init__(self, code: UserCode) -> None:
        self.code = code
        self.found: list[Specialization] = []
        self._thread = threading.get_ident()
        self._seen: dict[tuple[Any, Any, Any], bool] = {}

    def note(self, expression: Any, value: Any, frame: Any, batches: tuple[int, ...]) -> None:
        """Records a value that is another one for some of these numbers of images."""
        if threading.get_ident() != self._thread or not isinstance(value := _plain(value), (bool, int, float)):
            return
        key = expression, value, batches
        if key not in self._seen:
            self._seen[key] = _varies(expression, value, batches)
        if self._seen[key]:
            self.found.append(Specialization(expression, value, self.code.of_frame(frame)))


@contextlib.contextmanager
def recorded_branches(code: UserCode) -> Iterator[Specializations]:
    """Records branches in the user's own code that a single image would take otherwise.

    torch takes a dynamic size for two or more, so it follows `if x.shape[0] > 1` without a word.
    """
    record, original = Specializations(code), torch.SymBool.__bool__

    def decide(value: torch.SymBool) -> bool:
        expression, frame = value.node.expr, sys._getframe(1)
        decided = original(value)
        if code.owns(frame):
            record.note(expression, decided, frame, (1,))
        return decided

    with replaced(torch.SymBool, "__bool__", decide):
        yield record


@contextlib.contextmanager
def recorded_specializations(code: UserCode) -> Iterator[Specializations]:
    """Records what holds for the example's number of images alone: `int(x.shape[0])`, `range(batch)`, a branch."""
    record, original = Specializations(code), ShapeEnv.evaluate_expr

    def evaluate(env: ShapeEnv, expression: Any, *args: Any, **options: Any) -> Any:
        value = original(env, expression, *args, **options)
        record.note(expression, value, sys._getframe(1), _BATCHES)
        return value

    with replaced(ShapeEnv, "evaluate_expr", evaluate):
        yield record


_BATCHES = (2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 31, 64, 100)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Callable[..., Any] | property | type) -> Iterator[None]:
    """Sets an attribute of a class or module meanwhile."""
    with PATCHING:
        own, before = name in vars(owner), getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before) if own else delattr(owner, name)


def _plain(value: Any) -> Any:
    """Returns a number of sympy as one of Python."""
    if isinstance(value, (bool, int, float)):
        return value
    if getattr(value, "is_Boolean", False):
        return bool(value)
    return (int if value.is_integer else float)(value) if getattr(value, "is_number", False) else None


def _varies(expression: Any, value: Any, batches: tuple[int, ...]) -> bool:
    """Returns whether an expression of the batch is not this value for some number of images.

    Symbols that are no sizes of inputs (u0) are values of tensors.
    """
    symbols = getattr(expression, "free_symbols", ())
    if not symbols or any(str(symbol).startswith(("u", "zuf")) for symbol in symbols):
        return False
    try:
        found = [_plain(expression.subs(dict.fromkeys(symbols, batch))) for batch in batches]
    except (TypeError, ValueError, ZeroDivisionError):
        return False
    return any(each is not None and each != value for each in found)
