"""Bad calls of every operator, in a process of its own: `python hostile_operators.py LIBRARY LOG SEED FIRST LAST`.

A valid call comes from the laws of operator_laws.py and one or two of its arguments are changed. A call is drawn from
the seed and its number alone. What is called is written to the log before the call, and what came of it behind: a line
without an end is a crash or a hang, and the next process goes on behind it. LIBRARY is a `_C_cpu.so`, or "reference".
"""

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.bad_calls import bad_call, valid_calls

GARBAGE = (0x55, 0xAA)
M_PERTURB = -6
MEMORY = 24 * 2**30


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
