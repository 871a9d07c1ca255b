"""What a user reads where a model cannot be captured: the line of their code, and what to write instead."""

import re
from collections.abc import Sequence

from ptq4vm.graph.specializations import Specialization
from ptq4vm.graph.user_code import UserCode


class CaptureError(RuntimeError):
    """The model has no graph that torch.export can see, or none that is cut into blocks."""


def capture_error(error: Exception, code: UserCode, specializations: Sequence[Specialization]) -> CaptureError:
    """Returns what to raise for an export that failed.

    A value that was fixed for the example's batch explains an error that torch raises after tracing, without a place.
    """
    reason = str(error).strip().split("\n", 1)[0].rstrip(".")[:300]
    place = code.of_error(error)
    if specializations and not place.file:
        return specialized_error(specializations[0])
    return CaptureError(f"torch.export cannot capture {place}: {type(error).__name__}: {reason}. {_advice(reason)}")


def specialized_error(found: Specialization) -> CaptureError:
    """Returns what to raise where the number of images became a number, or decided a branch."""
    branch = isinstance(found.value, bool)
    what = "decides a branch" if branch else f"becomes the number {found.value}"
    return CaptureError(
        f"torch.export cannot capture {found.place}: there the batch size {what} ({found.expression}), and the graph "
        f"would hold for some batches alone. {_batch_advice(found)}"
    )


def region_error(place: str, operator: str) -> CaptureError:
    """Returns what to raise for a subgraph whose linears no pass sees."""
    return CaptureError(
        f"{place} has a region torch.export keeps apart ({operator}), so its linears would stay hidden; "
        "call the model without autocast or control-flow operators inside forward"
    )


def _batch_advice(found: Specialization) -> str:
    """Returns the rewrite for a line that needs the number of images as a number."""
    line = found.place.text
    advice = next((text for pattern, text in _BATCH_ADVICE if re.search(pattern, line)), None)
    if isinstance(found.value, bool):
        advice = (
            "Rewrite it without a branch on the number of images: write what is right for every batch, and let `view` "
            "and `reshape` take -1"
        )
    return advice or (
        "Keep it a size: compute with x.shape[0] itself, by `//` and `*`, and hand it to `view`, `expand` or "
        "`torch.zeros` as it is"
    )


_BATCH_ADVICE = (
    (r"\b(int|round|float)\(", "Leave out int(), float() and round(): `x.shape[0] // k` is a size for every batch"),
    (
        r"\b(np|numpy|math)\.",
        "Compute it with torch or by operators of Python: `x.shape[0] ** 0.5` for a root, `//` for a floor",
    ),
    (r"\brange\(|\bfor\b.*\bin\b", "Rewrite the loop over images as one operation on the whole batch"),
)


def _advice(reason: str) -> str:
    """Returns the rewrite for an exception."""
    advice = next((text for pattern, text in _ADVICE if re.search(pattern, reason, re.IGNORECASE)), _GENERAL)
    return f"{advice}; then `torch.export.export(model, example_inputs)` must succeed"


_GENERAL = (
    "Rewrite its forward without branches on tensor values or on the batch size (torch.where, torch.cond), "
    "or wrap that code in a torch.library.custom_op with a fake"
)
_ADVICE = (
    (r"numpy|ufunc", "Rewrite it with torch's operators: numpy sees no tensors while a model is captured"),
    (
        r"guard on data-dependent|data-dependent|Dynamic(Output)?Shape|\.item\(|unbacked|nonzero",
        "Rewrite its forward without branches, Python numbers (.item(), int(), float()) and sizes (nonzero, x[mask]) "
        "that depend on the values of a tensor: torch.where or torch.cond for a branch, a mask for a selection, or "
        "wrap that code in a torch.library.custom_op with a fake",
    ),
    (
        r"on the same device|cuda|nvidia|device.*mismatch",
        "Write `.to(x.device)` for `.cuda()` or a device by name: the model must run where its example inputs are",
    ),
    (
        r"positional argument|keyword argument|missing \d+ required",
        "example_inputs are passed by position: give one for every argument without a default; for a forward with "
        "keyword-only arguments, wrap the model in a module that passes them",
    ),
    (
        r"no fake impl|fake tensor|meta.*(kernel|backend|device)|not implemented.*meta|data pointer|storage",
        "Wrap the operator in a torch.library.custom_op with a fake (torch.library.register_fake): torch.export runs "
        "a model on tensors without values",
    ),
    (
        r"is mutated in the forward",
        "A quantized model has no state: set that tensor before `prepare`, or compute with a copy of it",
    ),
    (
        r"unhashable",
        "A size of the batch is no key of a dict or a set, nor an argument of a cached function: leave the batch out "
        "of the key",
    ),
)
