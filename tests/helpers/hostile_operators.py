"""Bad calls of every operator, in a process of its own: `python hostile_operators.py LIBRARY LOG SEED FIRST LAST`.

A valid call comes from the laws of operator_laws.py and one or two of its arguments are changed. A call is drawn from
the seed and its number alone. What is called is written to the log before the call, and what came of it behind: a line
without an end is a crash or a hang, and the next process goes on behind it. LIBRARY is a `_C_cpu.so`, or "reference".
"""

import contextlib
import ctypes
import json
import os
import random
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

GARBAGE = (0x55, 0xAA)
M_PERTURB = -6
MEMORY = 24 * 2**30
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


# --- what comes of it ---


def call(function: Callable[..., Any], arguments: list[Any], gradients: bool) -> tuple[Any, BaseException | None]:
    import torch

    try:
        with torch.set_grad_enabled(gradients):
            result = function(*arguments)
    except Exception as error:
        return None, error
    return result if isinstance(result, tuple | list) else (result,), None


def same_bits(a: Any, b: Any) -> bool:
    import torch

    if a.device.type == "meta" or not a.numel():
        return a.shape == b.shape and a.dtype == b.dtype
    bits = (x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)


def close(ours: Any, theirs: Any, exact: bool) -> bool:
    """Codes but for rounding ties, numbers within a few roundings of the largest."""
    import torch

    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or ours.device != theirs.device:
        return False
    if ours.device.type == "meta" or not ours.numel():
        return True
    if ours.dtype in (torch.int8, torch.int32):
        apart = (ours.int() - theirs.int()).abs()
        return not apart.any() if exact else bool(apart.max() <= 1 and (apart > 0).float().mean() <= 0.05)
    limit = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 2**-6
    ours, theirs = ours.double(), theirs.double()
    finite = theirs.isfinite()
    if not torch.equal(ours.isfinite(), finite) or not torch.equal(ours.isnan(), theirs.isnan()):
        return False
    least = theirs[finite].abs().max() if finite.any() else 0.0
    return bool(((ours - theirs)[finite].abs() <= limit * least).all())


EXACT = {"quantize", "choose_qparams"}


def is_compared(names: list[str], arguments: list[Any], changes: dict[str, str]) -> bool:
    """Whether there is one right result, but for rounding.

    Beside infinities and where states grow (negative steps, without softplus) rounding has no bound, and sums of a
    weight's codes are taken as given.
    """
    changed = {names[int(at)]: kind for at, kind in changes.items() if at.isdigit() and kind != "other_layout"}
    forged = any("weight_sum" in name for name in names) and any("weight" in name for name in changed)
    return not forged and "delta_softplus" not in changed and "other_values" not in changes.values()


def outcome(name: str, names: list[str], arguments: list[Any], changes: dict[str, str], perturb: Any) -> dict[str, str]:
    """`kind` and, for the bad ones, what was said or seen."""
    import torch

    from ptq4vm import ops

    gradients = "requires_grad" in changes.values()
    results = []
    for byte in GARBAGE:
        perturb(byte)
        results.append(call(getattr(torch.ops.ptq4vm, name), arguments, gradients))
    perturb(0)
    (first, error), (second, _) = results
    if error is not None:
        said = str(error)
        named = f"ptq4vm::{name}" in said or any(argument in said.split() for argument in names)
        return {"kind": "clear error" if named else "unclear error", "said": f"{type(error).__name__}: {said[:300]}"}
    if (
        gradients
        and not torch._C._dispatch_has_kernel_for_dispatch_key(f"ptq4vm::{name}", "Autograd")
        and any(isinstance(value, torch.Tensor) and value.requires_grad for value in arguments)
    ):
        return {"kind": "silent difference", "said": "a gradient is left out"}
    if len(first) != len(second) or not all(map(same_bits, first, second)):
        return {"kind": "silent difference", "said": "the result depends on what was in its memory"}
    if all(x.device.type == "meta" for x in arguments if isinstance(x, torch.Tensor)):
        return {"kind": "right"}  # there are no values
    theirs, refusal = call(ops.REFERENCES[name], arguments, False)
    if refusal is not None:
        return {"kind": "silent difference", "said": f"the reference says: {str(refusal)[:300]}"}
    if is_compared(names, arguments, changes) and not all(
        close(a, b, name in EXACT) for a, b in zip(first, theirs, strict=True)
    ):
        return {"kind": "silent difference", "said": "the result is not the reference's"}
    return {"kind": "right"}


def describe(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"


def main(library: str, log: str, seed: int, first: int, last: int) -> None:
    if library == "reference":
        os.environ["PTQ4VM_ISA"] = "reference"
    from ptq4vm.backend import native

    if library != "reference":
        native.LIBRARY = Path(library)
    from ptq4vm import ops

    if library != "reference":
        assert native.unavailable_reason() is None, native.unavailable_reason()
    perturb: Any = lambda byte: None  # noqa: E731
    if "ASAN_OPTIONS" not in os.environ:  # its own allocator has garbage of its own, and needs much address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        mallopt = ctypes.CDLL(None).mallopt
        perturb = lambda byte: mallopt(M_PERTURB, byte)  # noqa: E731
    import torch

    torch.set_num_threads(1)
    calls = valid_calls(seed)
    without = [name for name, found in calls.items() if not found]
    assert not without, f"no law calls {without}: see operator_laws.py"
    with open(log, "a", buffering=1) as out:
        for number in range(first, last):
            name, arguments, changes = bad_call(calls, seed, number)
            names = [argument.name for argument in getattr(torch.ops.ptq4vm, name).default._schema.arguments]
            of = {names[int(at)] if at.isdigit() else at: kind for at, kind in changes.items()}
            line = {"number": number, "operator": name, "changes": of, "arguments": [*map(describe, arguments)]}
            out.write(json.dumps(line) + "\t")
            out.flush()
            out.write(json.dumps(outcome(name, names, arguments, changes, perturb)) + "\n")
    assert ops.SCHEMAS


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
