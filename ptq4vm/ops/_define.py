"""Registers the `ptq4vm::` operators: schema, checks, reference, fake and gradient of each in one call.

The reference runs where no kernel is registered. A native kernel takes precedence on its device, then one in Triton.
Every operator returns new, contiguous tensors.
"""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptq4vm.backend import native, triton
from ptq4vm.ops._arguments import Arguments, Check, Shapes

_NATIVE = native.unavailable_reason() is None
"""Whether the library has defined the operators, and their kernels for the CPU."""

native.cuda_unavailable_reason()  # loads those for GPUs, if there are any

_library = torch.library.Library("ptq4vm", "FRAGMENT" if _NATIVE else "DEF")

SCHEMAS: list[str] = []

REFERENCES: dict[str, Callable[..., Any]] = {}
"""Each operator where there is no kernel at all: its checks, then the reference, which is its `__wrapped__`."""

on_gpus: dict[str, Callable[..., Any]] = {}
"""Each operator where there is no native kernel: in Triton, or the reference."""


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps an operator's leading tensors and the number behind them for `adjoint`."""
    tensors = tuple(itertools.takewhile(lambda value: value is None or isinstance(value, Tensor), inputs))
    ctx.save_for_backward(*tensors)
    ctx.option, ctx.others = inputs[len(tensors)], len(inputs) - len(tensors)


def define(
    schema: str,
    reference: Callable[..., Any],
    shapes: Shapes,
    fake: Callable[..., Any],
    *,
    checks: tuple[Check, ...] = (),
    gradient: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = save_inputs,
) -> None:
    """Defines an operator.

    Args:
        schema: Name, arguments and results. Saved graphs hold them, and csrc/bindings/ repeats them.
        reference: The operator in plain PyTorch.
        shapes: Each argument's kind and shape; see `Arguments`.
        fake: Returns empty results, for tensors without numbers.
        checks: Raise ValueError for what shapes do not say.
        gradient, save: As `torch.library.register_autograd` takes them. An operator without a gradient refuses tensors
            that require one, rather than to leave it out in silence.
    """
    arguments = Arguments(schema, shapes, checks)
    name = arguments.operator
    if not _NATIVE:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    elif not hasattr(torch.ops.ptq4vm, name):
        raise ImportError(
            f"{native.LIBRARY.name} is older than the code, without {name}: `pip install -e .` builds it anew"
        )
    SCHEMAS.append(schema)
    REFERENCES[name] = _checked(arguments, reference, fake)
    _library.impl(name, REFERENCES[name], "CompositeExplicitAutograd")
    kernel = triton.operator(name, reference)
    on_gpus[name] = _checked(arguments, kernel, fake)
    if native.cuda_unavailable_reason() is not None and kernel is not reference:
        _library.impl(name, on_gpus[name], "CUDA")
    checked_fake = _checked_fake(arguments, fake, refuses_gradients=gradient is None)
    torch.library.register_fake(f"ptq4vm::{name}", checked_fake, lib=_library)
    if gradient is not None:
        torch.library.register_autograd(f"ptq4vm::{name}", gradient, setup_context=save, lib=_library)


def _checked(arguments: Arguments, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an implementation in Python behind the checks that csrc/bindings/checks.h has for the native ones."""

    @functools.wraps(run)
    def checked(*values: Any) -> Any:
        arguments.check_placement(values, refuses_gradients=True)
        try:
            arguments.check(values)
            if any(isinstance(value, Tensor) and not value.numel() for value in values[:2]):
                results = fake(*values)  # loops over their other axes could be long
                if arguments.operator.endswith("_backward"):
                    return tuple(map(Tensor.zero_, results))
                if not any(result.numel() for result in (results if isinstance(results, tuple) else (results,))):
                    return results
            return run(*values)
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            raise RuntimeError(f"ptq4vm::{arguments.operator}: {error}") from error

    return checked


def _checked_fake(arguments: Arguments, fake: Callable[..., Any], refuses_gradients: bool) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        arguments.check_placement(values, refuses_gradients)
        return fake(*values)

    return checked


def adjoint(name: str) -> Callable[..., tuple[Any, ...]]:
    """Returns the gradient that the operator `name` computes, of the inputs that `save_inputs` keeps."""

    def gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        grads = getattr(torch.ops.ptq4vm, name)(grad.contiguous(), *inputs, ctx.option)
        return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), *(None,) * ctx.others

    return gradient


def like(x: Tensor, *rest: Any) -> Tensor:
    """Returns a fake result in x's shape and type."""
    return x.new_empty(x.shape)


def codes_like(x: Tensor, *rest: Any) -> Tensor:
    """Returns fake codes in x's shape."""
    return x.new_empty(x.shape, dtype=torch.int8)


def empty_gradient(x: Tensor | None, default: Tensor) -> Tensor:
    """Returns a contiguous tensor for the gradient of x; where there is no x, an empty one in `default`'s type."""
    return default.new_empty(0) if x is None else x.new_empty(x.shape)


def serve_other_gpus_later() -> None:
    """Calls `serve_other_gpus` when CUDA starts, before there are tensors on a GPU."""
    if native.cuda_unavailable_reason() is None:
        torch.cuda._lazy_call(serve_other_gpus)


def serve_other_gpus() -> None:
    """Sends tensors on GPUs that the library has no code for elsewhere; without such GPUs nothing changes."""
    if all(native.supports(device) for device in range(torch.cuda.device_count())):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a kernel is replaced
        for name, elsewhere in on_gpus.items():
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"ptq4vm::{name}", "CUDA"):
                kernel = torch.library.get_kernel(f"ptq4vm::{name}", "CUDA")
                _library.impl(name, by_gpu(kernel, elsewhere), "CUDA", with_keyset=True, allow_override=True)


def by_gpu(kernel: Any, elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the operator that calls the native kernel on GPUs that it serves, and `elsewhere` on others."""

    def choose(keys: Any, x: Tensor, *rest: Any) -> Any:
        if native.supports(x.device):
            return kernel.call_boxed(keys, x, *rest)
        native.warn_of_gpu(torch.cuda.get_device_capability(x.device))
        return elsewhere(x, *rest)

    return choose
