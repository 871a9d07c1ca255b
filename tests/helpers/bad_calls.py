"""Bad calls of every operator: a valid one, drawn from the laws, of which one or two arguments are changed.

A call is drawn from the seed and its number alone.
"""

import contextlib
import random
from collections.abc import Callable
from functools import partial
from typing import Any

EXAMPLES = 8

INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 9, 2**31, 2**32, 2**62, 2**63 - 1)
NUMBERS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, -1e38, 1e-45)
HUGE = 2**40


def valid_calls(seed: int) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each operator, as the laws call it."""
    from helpers.operator_laws import LAWS
    from ptq4vm import ops

    calls: dict[str, list[tuple[Any, ...]]] = {schema.split("(", 1)[0]: [] for schema in ops.SCHEMAS}

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                calls[name].append(arguments)
                return ops.REFERENCES[name](*arguments)

            return call

    for law in LAWS.values():
        _drawn(seed, law.arguments(), partial(_check, law, Recorder()))
    return calls


def _check(law: Any, operators: Any, drawn: dict[str, Any]) -> None:
    with contextlib.suppress(AssertionError):  # the tests of the law are elsewhere; here its calls are wanted
        law.check(operators, **drawn)


def _drawn(seed: int, strategy: Any, use: Callable[[dict[str, Any]], None]) -> None:
    import hypothesis

    chosen = hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(seed)(chosen(hypothesis.given(strategy)(lambda drawn: use(drawn))))()


# --- changes: each gives what is passed instead, or None where it has nothing to change ---


def other_dtype(draw: random.Random, x: Any) -> Any:
    import torch

    names = "float32 float64 float16 bfloat16 int8 uint8 int16 int32 int64 bool complex64 float8_e4m3fn"
    dtype = getattr(torch, draw.choice(names.split()))
    return x.to(dtype)


def other_shape(draw: random.Random, x: Any) -> Any:
    if not x.dim():
        return x.expand(3)
    axis = draw.randrange(x.dim())
    return draw.choice(
        [
            lambda: x.unsqueeze(axis),
            lambda: x.select(axis, 0) if x.shape[axis] else x.sum(axis),
            lambda: x.narrow(axis, 0, x.shape[axis] // 2),
            lambda: x.narrow(axis, 0, 0),
            lambda: x.repeat_interleave(2, axis),
            lambda: x.transpose(axis, -1),
            lambda: x.flatten(),
            lambda: x.reshape(-1)[:1].squeeze(0) if x.numel() else x.new_zeros(()),
        ]
    )()


def other_layout(draw: random.Random, x: Any) -> Any:
    """The same values in other memory: no implementation may give anything else."""
    import torch

    wide = torch.cat((x, x), -1) if x.dim() else x.expand(2)
    raw = torch.frombuffer(bytearray(x.numel() * x.element_size() + 1) or bytearray(1), dtype=torch.uint8)

    def misaligned() -> Any:
        if not x.numel():
            return x
        raw[1:].copy_(x.contiguous().reshape(-1).view(torch.uint8))
        return torch.frombuffer(raw.numpy(), dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)

    def part() -> Any:
        return wide[..., x.shape[-1] :] if x.dim() else wide[1]

    def turned() -> Any:
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x

    def negated() -> Any:
        return torch._neg_view(-x) if x.dtype.is_floating_point else x

    return draw.choice([misaligned, part, turned, negated])()


def expanded(draw: random.Random, x: Any) -> Any:
    """One value everywhere, sometimes in very many places."""
    if not x.dim() or not x.numel():
        return x
    shape = list(x.shape)
    if draw.random() < 0.3:
        shape[draw.randrange(len(shape))] = HUGE
    return x.reshape(-1)[:1].view([1] * len(shape)).expand(shape)


def other_values(draw: random.Random, x: Any) -> Any:
    import torch

    if not x.numel():
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    flat = x.view(-1)
    at = draw.randrange(len(flat))
    if x.dtype.is_floating_point:
        flat[at] = draw.choice(NUMBERS)
    elif draw.random() < 0.5:
        flat[at] = flat[draw.randrange(len(flat))]  # two alike
    else:
        kind = draw.choice([x.dtype, torch.int64]) if x.dtype is not torch.int8 else torch.int8
        x = x.to(kind)
        limits = torch.iinfo(kind)
        x.view(-1)[at] = draw.choice([v for v in (*INTEGERS, 127, -128, 128) if limits.min <= v <= limits.max])
    return x


def on_meta(draw: random.Random, x: Any) -> Any:
    return x.to("meta")


def sparse(draw: random.Random, x: Any) -> Any:
    return x.to_sparse() if x.dim() else x


def requires_grad(draw: random.Random, x: Any) -> Any:
    return x.clone().requires_grad_() if x.dtype.is_floating_point else x


def nothing(draw: random.Random, x: Any) -> None:
    return None


CHANGES = {
    change.__name__: change
    for change in (
        other_dtype, other_shape, other_layout, expanded, other_values, on_meta, sparse, requires_grad, nothing
    )
}  # fmt: skip


def changed(draw: random.Random, value: Any) -> tuple[str, Any]:
    """The name of a change, and what it makes of an argument."""
    import torch

    if isinstance(value, torch.Tensor):
        name = draw.choice([*CHANGES, "other_shape", "other_values", "other_dtype"])
        return name, CHANGES[name](draw, value)
    if isinstance(value, bool):
        return "other_flag", not value
    if isinstance(value, int):
        return "other_integer", draw.choice(INTEGERS)
    if isinstance(value, float):
        return "other_number", draw.choice(NUMBERS)
    if isinstance(value, torch.dtype):
        return "other_dtype", draw.choice([torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64])
    return "a_tensor", torch.ones(3)


def emptied(draw: random.Random, arguments: list[Any]) -> list[Any]:
    """One size of the first tensor is 0 and another 2^40, wherever they come: nothing is to be done, and at once."""
    import torch

    shape = next(x for x in arguments if isinstance(x, torch.Tensor)).shape
    if len(shape) < 2:
        return arguments
    first, second = draw.sample(range(len(shape)), 2)
    sizes = {shape[second]: HUGE, shape[first]: 0}

    def other(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not set(x.shape) & set(sizes):
            return x
        shape = [sizes.get(size, size) for size in x.shape]
        return torch.ones((), dtype=x.dtype).expand(shape) if shape.count(HUGE) < 2 else x

    return [other(x) for x in arguments]


def bad_call(calls: dict[str, list[tuple[Any, ...]]], seed: int, number: int) -> tuple[str, list[Any], dict[str, str]]:
    """The operator, its arguments, and what was changed by the argument's place."""
    draw = random.Random(f"{seed} {number}")
    names = sorted(calls)
    name = names[number % len(names)]
    arguments = list(draw.choice(calls[name]))
    if draw.random() < 0.06:
        return name, emptied(draw, arguments), {"all": "emptied"}
    changes = {}
    for _ in range(draw.choice([1, 1, 1, 2])):
        at = draw.randrange(len(arguments))
        if str(at) not in changes:  # what was made very large cannot be copied
            changes[str(at)], arguments[at] = changed(draw, arguments[at])
    return name, arguments, changes
