"""Checks of the operators' arguments, by tables: the Python side of csrc/bindings/checks.h, which asks the same.

They run before every implementation in Python, so that a user without a compiler reads the same refusals. Values (zero
points, orders, sums) are read on the CPU only: a GPU would wait.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Values = dict[str, Any]
Check = Callable[[Values], None]
Shapes = str | Callable[[Values], str]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int8, torch.int16, torch.uint8)

DTYPES = {
    "float": FLOATS,
    "number": FLOATS + INTEGERS,
    "codes": (torch.int8,),
    "weight": (torch.int8, torch.uint8),
    "zeros": INTEGERS,
    "sums": INTEGERS,
    "order": INTEGERS,
}
"""The kinds of arguments: zeros are zero points within int8, sums those of a weight's codes."""

MAX_TOKENS = 2**24
"""The most tokens of an order, which are counted."""


class Arguments:
    """An operator's arguments and all checks of them.

    `shapes` says each argument's kind and shape: "x float ... D; bits bits". A size is a letter that stands for the
    same number everywhere, `L|1` either of the two, `...` any axes, `*` a shape that another check knows, `=other` the
    shape of another argument, and `tokens` the shape of scales of the operator's input: (1,), (L,), or the input's
    shape without channels.
    """

    def __init__(self, schema: str, shapes: Shapes, checks: tuple[Check, ...]) -> None:
        parsed = torch._C.parse_schema(f"ptq4vm::{schema}").arguments
        self.operator = schema.split("(", 1)[0]
        self.names = tuple(each.name for each in parsed)
        self.optional = {each.name for each in parsed if isinstance(each.type, torch.OptionalType)}
        self.shapes, self.checks = shapes, checks

    def check_placement(self, values: Sequence[Any], refuses_gradients: bool) -> None:
        """Checks that all tensors are there and lie in strides on one device, and that none requires a gradient.

        Raises ValueError for the first, and RuntimeError for the second: the operator has no gradient.
        """
        first: Tensor | None = None
        for name, value in zip(self.names, values, strict=True):
            if value is None and name not in self.optional:
                raise ValueError(f"ptq4vm::{self.operator}: {name} is None, it must be a tensor")
            if not isinstance(value, Tensor):
                continue
            first = value if first is None else first
            if value.device != first.device:
                raise ValueError(
                    f"ptq4vm::{self.operator}: all tensors must be on one device: the first is on {first.device}, "
                    f"another on {value.device}, {name}; move the model and its inputs with .to(device)"
                )
            if value.layout is not torch.strided:
                raise ValueError(f"ptq4vm::{self.operator}: {name} is sparse: call .to_dense()")
            if refuses_gradients and value.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"ptq4vm::{self.operator}: the operator has no gradient, and {name} requires one: call it under "
                    "torch.no_grad(), or take gradients of the prepared model"
                )

    def check(self, values: Sequence[Any]) -> None:
        """Raises ValueError for dtypes, shapes and values that the operator does not take."""
        named = dict(zip(self.names, values, strict=True))
        try:
            _check_tensors(_parsed(self.shapes if isinstance(self.shapes, str) else self.shapes(named)), named)
            for check in self.checks:
                check(named)
        except ValueError as error:
            raise ValueError(f"ptq4vm::{self.operator}: {error}") from None


@functools.cache
def _parsed(shapes: str) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    return tuple((words[0], words[1], tuple(words[2:])) for words in map(str.split, shapes.split("; ")))


def _check_tensors(shapes: Sequence[tuple[str, str, tuple[str, ...]]], values: Values) -> None:
    sizes: dict[str, int] = {}
    first = values[next(name for name, *_ in shapes if name.startswith(("x", "u")))]
    for name, kind, axes in shapes:
        value = values[name]
        if kind == "bits":
            if not 2 <= value <= 8:
                raise ValueError(f"bits must be between 2 and 8, got {value}")
            continue
        if value is None:
            continue
        if value.dtype not in DTYPES[kind]:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[kind])
            raise ValueError(f"{name} must be {wanted}, it is {str(value.dtype).removeprefix('torch.')}")
        if axes[-1] == "tokens":
            check_scales(first, value, stacked=len(axes) > 1)
        elif axes[0].startswith("="):
            _check_same(name, value, values[axes[0][1:]])
        else:
            _check_axes(name, value, axes, sizes)
        if kind == "zeros":
            _check_zero_points(name, value)


def _check_same(name: str, value: Tensor, other: Tensor) -> None:
    if "zero_point" in name and value.numel() != other.numel():
        raise ValueError(f"{name}: there are {other.numel()} scales and {value.numel()} zero points")
    check_shape(name, value, tuple(other.shape))


def check_shape(name: str, value: Tensor, wanted: tuple[int, ...]) -> None:
    """Raises ValueError for another shape."""
    if tuple(value.shape) != wanted:
        raise ValueError(
            f"{name} has another shape than the other arguments ask for: {tuple(value.shape)}, not {wanted}"
        )


def _check_axes(name: str, value: Tensor, axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    if axes == ("*",):
        return
    if "..." in axes:
        at = axes.index("...")
        axes = (*axes[:at], *("_" * (value.dim() - len(axes) + 1)), *axes[at + 1 :])
        if "*" not in axes and value.dim() < len(axes):
            raise ValueError(f"{name} needs {len(axes)} axes or more, its shape is {tuple(value.shape)}")
    if value.dim() != len(axes):
        raise ValueError(f"{name} must be ({', '.join(axes)}), its shape is {tuple(value.shape)}")
    check_shape(name, value, tuple(_size(axis, have, sizes) for axis, have in zip(axes, value.shape, strict=True)))


def _size(axis: str, have: int, sizes: dict[str, int]) -> int:
    """Returns the size that an axis should have; its own where nothing is known of it."""
    if axis in ("_", "*"):
        return have
    if axis.endswith("|1"):
        return 1 if have == 1 else sizes[axis[0]]
    return sizes.setdefault(axis, have)


def check_scales(x: Tensor, scale: Tensor, stacked: bool = False) -> None:
    """Raises ValueError unless scales are per tensor (1,), per token (L,) or per image and token (B, L) of x.

    Stacked: x and its scales have an axis of directions before these.
    """
    if stacked and (scale.dim() < 1 or scale.shape[0] != x.shape[0]):
        raise ValueError(f"scales of {len(x)} stacked inputs need as many, their shape is {tuple(scale.shape)}")
    own, inputs = scale.shape[stacked:], x.shape[stacked:-1]
    tokens = inputs[-1] if inputs else 1
    if len(own) == 1 and own[0] not in (1, tokens):
        raise ValueError(
            f"token scales were calibrated for {own[0]} tokens, the input has {tokens}; "
            "calibrate at this resolution or use Granularity.PER_TENSOR"
        )
    if len(own) != 1 and own != inputs:
        raise ValueError(
            f"scales of shape {tuple(scale.shape)} do not fit an input of shape {tuple(x.shape)}: they need its shape "
            "without the last axis"
        )


def _check_zero_points(name: str, value: Tensor) -> None:
    if value.device.type == "cpu":
        value = value.long()
        wrong = value[(value < -128) | (value > 127)]
        if len(wrong):
            raise ValueError(f"{name}: zero points are int8 codes, one is {int(wrong[0])}")


def check_order(order: Tensor, tokens: int, least: int) -> None:
    """Raises ValueError unless every direction of an order names tokens from `least` on, and each token once."""
    order = order.long()
    if order.device.type != "cpu":
        return
    if order.numel() and tokens > MAX_TOKENS:
        raise ValueError(f"an order is of at most {MAX_TOKENS} tokens, not {tokens}")
    wrong = order[(order < least) | (order >= tokens)]
    if len(wrong):
        raise ValueError(
            f"the order of {tokens} tokens names token {int(wrong[0])}, which is not between {least} and {tokens - 1}"
        )
    if not order.numel():
        return
    ordered = order.sort(-1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(twice):
        direction, at = twice[0].tolist()
        raise ValueError(f"the order of direction {direction} names token {int(ordered[direction, at])} twice")
