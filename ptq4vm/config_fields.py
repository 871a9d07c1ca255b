"""Frozen dataclasses that check themselves: a field's type, or a check beside it, declares the values it accepts.

bits: Annotated[int, whole(2, 8)] = 8   # a check of its own
factors: Factors | None = None          # a member of the enum, its value, or None
learning: Learning | None = None        # another such dataclass, a mapping of its fields, or None
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin, get_type_hints

Check = Callable[[str, Any], Any]
"""Takes a field's dotted name and a value; returns the value as the field keeps it, or raises ValueError."""


class Checked:
    """Base of dataclasses whose fields are checked and converted at construction."""

    __slots__ = ()
    section: ClassVar[str] = ""
    """Begins the names of fields in messages, as in `learning.epochs`."""

    def __post_init__(self) -> None:
        for name, check in _checks(type(self)).items():  # type: ignore[arg-type]  # a class has a hash
            dotted = f"{self.section}.{name}".lstrip(".")
            object.__setattr__(self, name, check(dotted, getattr(self, name)))
        self._check_together()

    def _check_together(self) -> None:
        """Raises ValueError for fields that contradict each other."""

    @classmethod
    def from_keys(cls, values: Mapping[str, Any]) -> Self:
        """Returns an instance from a mapping of its fields; raises ValueError for keys unknown or missing."""
        fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        name = cls.section or "config"
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"{name} has no key {', '.join(map(repr, unknown))}; it knows {', '.join(fields)}")
        for key in fields.keys() - set(values):
            if fields[key].default is dataclasses.MISSING:
                raise ValueError(f"{name} needs the key {key!r}; to leave it out use null")
        return cls(**values)


def refuse(contradictions: Mapping[str, object]) -> None:
    """Raises ValueError with the first message whose condition holds."""
    if message := next((message for message, holds in contradictions.items() if holds), None):
        raise ValueError(message)


@functools.cache
def _checks(kind: type) -> dict[str, Check]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _check_of(hints[field.name]) for field in dataclasses.fields(kind)}


def _check_of(hint: Any, keys: str = " or its keys") -> Check:
    """Returns the check that a field's type stands for."""
    if get_origin(hint) is Annotated:
        return hint.__metadata__[0]
    if NoneType in (kinds := get_args(hint)):
        check = _check_of(kinds[0], ", its keys, or None")
        return lambda name, value: value if value is None else check(name, value)
    if hint is bool:
        return flag
    if issubclass(hint, enum.Enum):
        return functools.partial(member, hint)
    return functools.partial(_section, hint, keys)


def number(holds: Callable[[Any], bool], wanted: str, kind: type | UnionType = int) -> Check:
    """Returns the check of numbers for which `holds` does; `wanted` names them in the message, up to "got"."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
            raise ValueError(f"{name} must be {wanted} got {value!r}")
        return value

    return check


def whole(low: int, high: int) -> Check:
    """Returns the check of whole numbers from `low` to `high`."""
    return number(lambda value: low <= value <= high, f"a whole number between {low} and {high},")


def flag(name: str, value: Any) -> bool:
    """Accepts true and false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def member(kind: type[enum.StrEnum], name: str, value: Any) -> enum.StrEnum:
    """Accepts members of an enum and their values."""
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(kind)}; got {value!r}") from None


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """Accepts sequences of shell patterns."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be a sequence of patterns, got {value!r}")
    if not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{name} must hold patterns of linears' names, got {list(value)!r}")
    return tuple(value)


def _section(kind: type[Checked], keys: str, name: str, value: Any) -> Checked:
    if isinstance(value, Mapping):
        return kind.from_keys(value)
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}{keys}; got {value!r}")
    return value
