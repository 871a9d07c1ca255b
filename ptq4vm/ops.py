"""The `ptq4vm::` operators: schema, fake and gradient of each in one place; the default is the reference.

A native kernel registers for its device and takes precedence. Every op returns new, contiguous tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptq4vm import arguments, fused, native, reference, triton_kernels

_NATIVE = native.problem() is None
"""Then the library has defined the operators, and their kernels for the CPU."""

native.cuda_problem()  # loads those for GPUs, if there are any

_library = torch.library.Library("ptq4vm", "FRAGMENT" if _NATIVE else "DEF")

SCHEMAS: list[str] = []

REFERENCES: dict[str, Callable[..., Any]] = {}
"""Each operator as it is where there is no kernel at all."""

_on_gpus: dict[str, Callable[..., Any]] = {}
"""Each operator where there is no native kernel: in Triton, or the reference."""


_DIFFERENTIABLE = {"rotate", "selective_scan", "selective_scan_quantized", "causal_conv1d", "fake_quantize"}
"""Operators with gradients. The others refuse tensors that require one, rather than to leave it out in silence."""


def _define(schema: str, default: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    names = arguments.names_of(schema)
    SCHEMAS.append(schema)
    if not _NATIVE:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    REFERENCES[name] = _checked(name, names, default, fake)
    _library.impl(name, REFERENCES[name], "CompositeExplicitAutograd")
    on_gpus = triton_kernels.operator(name, default)
    _on_gpus[name] = _checked(name, names, on_gpus, fake)
    if native.cuda_problem() is not None and on_gpus is not default:
        _library.impl(name, _on_gpus[name], "CUDA")
    torch.library.register_fake(f"ptq4vm::{name}", _checked_fake(name, names, fake), lib=_library)


def _checked(
    name: str, names: tuple[str, ...], run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """An implementation in Python, after the checks that csrc/bindings has for the native ones."""

    def operator(*values: Any) -> Any:
        arguments.check_placement(name, names, values, gradients=True)
        try:
            arguments.check(name, names, values)
            if any(isinstance(value, Tensor) and not value.numel() for value in values[:2]):
                results = _of_nothing(name, fake(*values))
                if results is not None:
                    return results
            return run(*values)
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            raise RuntimeError(f"ptq4vm::{name}: {error}") from error

    return operator


def _of_nothing(name: str, results: Any) -> Any:
    """Results without numbers, and gradients of nothing, which are zeros: loops over their other axes could be long."""
    several = results if isinstance(results, tuple) else (results,)
    if name.endswith("_backward"):
        return tuple(map(Tensor.zero_, several))
    return None if any(result.numel() for result in several) else results


def _checked_fake(name: str, names: tuple[str, ...], fake: Callable[..., Any]) -> Callable[..., Any]:
    def operator(*values: Any) -> Any:
        arguments.check_placement(name, names, values, gradients=name not in _DIFFERENTIABLE)
        return fake(*values)

    return operator


def _quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int) -> Tensor:
    return reference.quantize(x, inv_scale, zero_point, inv_smooth, bits).contiguous()


def _quantize_fake(x: Tensor, inv_scale: Tensor, zero_point: Tensor, inv_smooth: Tensor | None, bits: int) -> Tensor:
    arguments.check_scales(x, inv_scale)
    return x.new_empty(x.shape, dtype=torch.int8)


_define(
    "quantize(Tensor x, Tensor inv_scale, Tensor zero_point, Tensor? inv_smooth, int bits) -> Tensor",
    _quantize,
    _quantize_fake,
)


def _choose_qparams_fake(x: Tensor, inv_smooth: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.float32), x.new_empty(x.shape[:-1], dtype=torch.int32)


_define(
    "choose_qparams(Tensor x, Tensor? inv_smooth, int bits) -> (Tensor scale, Tensor zero_point)",
    reference.choose_qparams,
    _choose_qparams_fake,
)


def _dequantize_fake(x_q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return x_q.new_empty(x_q.shape, dtype=torch.float32)


_define(
    "dequantize(Tensor x_q, Tensor scale, Tensor zero_point) -> Tensor",
    lambda x_q, scale, zero_point: reference.dequantize(x_q, scale, zero_point).contiguous(),
    _dequantize_fake,
)


_define("rotate(Tensor x) -> Tensor", reference.rotate, lambda x: x.new_empty(x.shape))

torch.library.register_autograd("ptq4vm::rotate", lambda _, grad: torch.ops.ptq4vm.rotate(grad), lib=_library)


def _linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if not _NATIVE and x.device.type == "cpu":
        native.warn()
    return reference.linear(x, x_scale, x_zero_point, weight, weight_scale, bias, out_dtype).contiguous()


def _linear_fake(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    arguments.check_scales(x, x_scale)
    arguments.check_weight(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


_define(
    "linear(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    _linear,
    _linear_fake,
)


def _empty_like(original: Tensor | None, default: Tensor) -> Tensor:
    """A contiguous tensor for the gradient of `original`; empty where there is none."""
    return default.new_empty(0) if original is None else original.new_empty(original.shape)


def _selective_scan_fake(u: Tensor, *rest: Any) -> Tensor:
    return u.new_empty(u.shape)


def _selective_scan_backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    kind = torch.promote_types(grad.dtype, torch.float32)
    default = grad.new_empty(0, dtype=kind)
    return tuple(_empty_like(tensor, default) for tensor in inputs[:8])


_SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus"
)
_define(f"selective_scan({_SCAN}) -> Tensor", reference.selective_scan, _selective_scan_fake)
_define(
    f"selective_scan_backward(Tensor grad, {_SCAN}) -> ({', '.join(['Tensor'] * 8)})",
    reference.selective_scan_backward,
    _selective_scan_backward_fake,
)


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.delta_softplus = inputs[8]


def _scan_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    grads = torch.ops.ptq4vm.selective_scan_backward(grad.contiguous(), *inputs, ctx.delta_softplus)
    return *(None if tensor is None else g for tensor, g in zip(inputs, grads, strict=True)), None


torch.library.register_autograd("ptq4vm::selective_scan", _scan_gradient, setup_context=_save_scan, lib=_library)


def _check_states(u: Tensor, state_scale: Tensor) -> None:
    if state_scale.dim() != 1 or state_scale.shape[0] not in (1, u.shape[1]):
        raise ValueError(
            f"state scales of shape {tuple(state_scale.shape)} were calibrated for another number of tokens than the "
            f"{u.shape[1]} of this scan; calibrate at this resolution"
        )


def _selective_scan_quantized_fake(u: Tensor, *rest: Any) -> Tensor:
    _check_states(u, rest[8])
    return u.new_empty(u.shape)


_define(
    f"selective_scan_quantized({_SCAN}, Tensor state_scale, Tensor state_inv_scale, int bits) -> Tensor",
    reference.selective_scan_quantized,
    _selective_scan_quantized_fake,
)


def _quantized_scan_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Straight through the rounding: the gradient of the scan whose states are not rounded."""
    return *_scan_gradient(ctx, grad), None, None, None


torch.library.register_autograd(
    "ptq4vm::selective_scan_quantized", _quantized_scan_gradient, setup_context=_save_scan, lib=_library
)


def _causal_conv1d_fake(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _causal_conv1d_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(x, grad), _empty_like(weight, grad), _empty_like(bias, grad)


_CONV = "Tensor x, Tensor weight, Tensor? bias, bool silu"
_define(f"causal_conv1d({_CONV}) -> Tensor", reference.causal_conv1d, _causal_conv1d_fake)
_define(
    f"causal_conv1d_backward(Tensor grad, {_CONV}) -> (Tensor, Tensor, Tensor)",
    reference.causal_conv1d_backward,
    _causal_conv1d_backward_fake,
)


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.silu = inputs[3]


def _conv_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    grads = torch.ops.ptq4vm.causal_conv1d_backward(grad.contiguous(), x, weight, bias, ctx.silu)
    return grads[0], grads[1], None if bias is None else grads[2], None


torch.library.register_autograd("ptq4vm::causal_conv1d", _conv_gradient, setup_context=_save_conv, lib=_library)

_FAKE = "Tensor x, Tensor scale, Tensor? zero_point, Tensor? smooth, int bits"
_NEEDS = "bool need_x, bool need_scale, bool need_zero_point, bool need_smooth"


def _fake_quantize_fake(x: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    arguments.check_scales(x, scale)
    return x.new_empty(x.shape)


def _fake_quantize_backward_fake(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    smooth: Tensor | None,
    bits: int,
    need_x: bool,
    need_scale: bool,
    need_zero_point: bool,
    need_smooth: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factor = x if smooth is None else smooth
    return (
        x.new_empty(x.shape if need_x else 0),
        scale.new_empty(scale.shape if need_scale else 0),
        scale.new_empty(scale.shape if need_zero_point else 0, dtype=torch.float32),
        factor.new_empty(x.shape[-1] if need_smooth else 0),
    )


_define(f"fake_quantize({_FAKE}) -> Tensor", reference.fake_quantize, _fake_quantize_fake)
_define(
    f"fake_quantize_backward(Tensor grad, {_FAKE}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.fake_quantize_backward,
    _fake_quantize_backward_fake,
)


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.bits = inputs[4]


def _fake_quantize_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:4]
    grads = torch.ops.ptq4vm.fake_quantize_backward(grad.contiguous(), *ctx.saved_tensors, ctx.bits, *needs)
    return *(value if need else None for value, need in zip(grads, needs, strict=True)), None


torch.library.register_autograd(
    "ptq4vm::fake_quantize", _fake_quantize_gradient, setup_context=_save_fake_quantize, lib=_library
)

_QPARAMS = "Tensor inv_scale, Tensor zero_point, Tensor? inv_smooth, int bits"
_PACKED = "Tensor weight, Tensor weight_sum, Tensor weight_scale, Tensor? bias"
_STEPS = (
    "Tensor u, Tensor projected, Tensor step_inv_scale, Tensor step_scale, Tensor step_zero_point, "
    "Tensor? step_inv_smooth, int step_bits, Tensor step_weight, Tensor step_weight_sum, Tensor step_weight_scale, "
    "Tensor step_bias, Tensor A, Tensor? D, Tensor? z, Tensor order"
)


def _linear_packed_fake(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    *rest: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[-1]), dtype=rest[-1])


_define(
    f"linear_packed(Tensor x, Tensor x_scale, Tensor x_zero_point, {_PACKED}, ScalarType out_dtype) -> Tensor",
    fused.linear_packed,
    _linear_packed_fake,
)


def _linear_gelu_quantize_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[4].shape[-1]), dtype=torch.int8)


_define(
    f"linear_gelu_quantize(Tensor x, Tensor x_scale, Tensor x_zero_point, {_PACKED}, bool rotated, "
    f"{_QPARAMS}) -> Tensor",
    fused.linear_gelu_quantize,
    _linear_gelu_quantize_fake,
)


_define(
    f"rotate_quantize(Tensor x, bool gelu, {_QPARAMS}) -> Tensor",
    fused.rotate_quantize,
    lambda x, *rest: x.new_empty(x.shape, dtype=torch.int8),
)


def _norm_quantize_fake(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0 if residual is None else x.shape, dtype=torch.float32)
    return total, x.new_empty(x.shape, dtype=torch.int8)


_define(
    f"norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, "
    f"bool rotated, {_QPARAMS}) -> (Tensor, Tensor)",
    fused.norm_quantize,
    _norm_quantize_fake,
)


def _conv1d_quantize_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[0], *x.shape)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int8)


_define(
    f"conv1d_quantize(Tensor x, Tensor weight, Tensor? bias, Tensor order, {_QPARAMS}) -> (Tensor, Tensor)",
    fused.conv1d_quantize,
    _conv1d_quantize_fake,
)


def _conv2d_quantize_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, inv_scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((inv_scale.shape[0], *x.shape), dtype=torch.int8)


_define(
    f"conv2d_quantize(Tensor x, Tensor weight, Tensor? bias, int height, int width, {_QPARAMS}) -> (Tensor, Tensor)",
    fused.conv2d_quantize,
    _conv2d_quantize_fake,
)


def _directional_scan_fake(u: Tensor, projected: Tensor, *rest: Any) -> Tensor:
    merge = rest[-2]
    return u.new_empty(u.shape[1:] if merge else (projected.shape[0], *u.shape[1:]))


_define(
    f"directional_scan({_STEPS}, bool merge, float factor) -> Tensor", fused.directional_scan, _directional_scan_fake
)
_define(
    f"directional_scan_quantize({_STEPS}, float factor, {_QPARAMS}) -> Tensor",
    fused.directional_scan_quantize,
    lambda u, *rest: u.new_empty(u.shape[1:], dtype=torch.int8),
)


def _serve_other_gpus() -> None:
    """Tensors on GPUs that the library has no code for go elsewhere; nothing changes where there are no such GPUs."""
    if all(native.serves(device) for device in range(torch.cuda.device_count())):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a kernel is replaced
        for name, elsewhere in _on_gpus.items():
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"ptq4vm::{name}", "CUDA"):
                kernel = torch.library.get_kernel(f"ptq4vm::{name}", "CUDA")
                _library.impl(name, _by_gpu(kernel, elsewhere), "CUDA", with_keyset=True, allow_override=True)


def _by_gpu(kernel: Any, elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    def operator(keys: Any, x: Tensor, *rest: Any) -> Any:
        if native.serves(x.device):
            return kernel.call_boxed(keys, x, *rest)
        native.warn_of_gpu(torch.cuda.get_device_capability(x.device))
        return elsewhere(x, *rest)

    return operator


if native.cuda_problem() is None:
    torch.cuda._lazy_call(_serve_other_gpus)  # when CUDA starts, before there are tensors on a GPU


quantize = torch.ops.ptq4vm.quantize
choose_qparams = torch.ops.ptq4vm.choose_qparams
dequantize = torch.ops.ptq4vm.dequantize
rotate = torch.ops.ptq4vm.rotate
linear = torch.ops.ptq4vm.linear
selective_scan = torch.ops.ptq4vm.selective_scan
selective_scan_quantized = torch.ops.ptq4vm.selective_scan_quantized
causal_conv1d = torch.ops.ptq4vm.causal_conv1d
fake_quantize = torch.ops.ptq4vm.fake_quantize
linear_packed = torch.ops.ptq4vm.linear_packed
linear_gelu_quantize = torch.ops.ptq4vm.linear_gelu_quantize
rotate_quantize = torch.ops.ptq4vm.rotate_quantize
norm_quantize = torch.ops.ptq4vm.norm_quantize
conv1d_quantize = torch.ops.ptq4vm.conv1d_quantize
conv2d_quantize = torch.ops.ptq4vm.conv2d_quantize
directional_scan = torch.ops.ptq4vm.directional_scan
directional_scan_quantize = torch.ops.ptq4vm.directional_scan_quantize
