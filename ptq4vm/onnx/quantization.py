"""Quantize, dequantize, linear and what belongs to them, in stock operators of ONNX.

A runtime multiplies unsigned codes: a code q is stored as q + 128 in uint8. What a row (an image and token) has of its
own stays outside the product, where runtimes know no such scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ptq4vm.onnx.builder import Builder, Operand
from ptq4vm.onnx.calls import Call, constant_of, rank, size
from ptq4vm.ops.layouts import unpack_int4
from ptq4vm.ops.quantization import EPSILON, code_range
from ptq4vm.ops.rotation import LARGEST_HARTLEY, hadamard, hartley


@dataclass(frozen=True, slots=True)
class Form:
    """How a runtime wants its integers."""

    matmul_integer: bool = False
    """MatMulInteger, exact; without it Q/DQ nodes around a MatMul."""
    signed: bool = False
    """Codes as int8 with zero point 0, as TensorRT wants them: OpenVINO computes garbage from them.

    TensorRT dequantizes int8 and INT4 and does nothing else with them, so codes are numbers of float32 wherever they
    are moved, and weights are whole bytes: INT4 is for weights whose product is in floating point.
    """

    @property
    def zero(self) -> int:
        """What the code 0 is stored as."""
        return 0 if self.signed else 128

    def stored(self, codes: np.ndarray) -> np.ndarray:
        return (codes.astype(np.int32) + self.zero).astype(np.int8 if self.signed else np.uint8)


def as_float(b: Builder, x: ir.Value) -> ir.Value:
    return x if x.dtype is ir.DataType.FLOAT else b.Cast(x, to=ir.DataType.FLOAT)


def _rows(b: Builder, x: ir.Value, qparams: ir.Value) -> ir.Value | np.ndarray:
    """Returns qparams that broadcast against x (…, D): a scalar, (L, 1), or (B, L, 1)."""
    numbers = constant_of(qparams)
    if numbers is None:
        values = as_float(b, qparams)
        return b.Unsqueeze(values, [-1]) if rank(qparams) < rank(x) else values
    numbers = numbers.astype(np.float32)
    if numbers.size == 1:
        return numbers.reshape(())
    return numbers[..., None] if numbers.ndim < rank(x) else numbers


def _smoothed(b: Builder, call: Call) -> ir.Value:
    x, smooth = as_float(b, call["x"]), call.get("inv_smooth")
    return x if smooth is None else b.Mul(x, smooth)


def quantize(b: Builder, call: Call, form: Form) -> list[ir.Value]:
    """clamp(round_half_even(x · inv_smooth · inv_scale) + zero_point), stored as `form` says."""
    x, (low, high) = call["x"], code_range(call.number("bits"))
    v = b.Mul(_smoothed(b, call), _rows(b, x, call["inv_scale"]))
    zero, narrow = call.constant("zero_point"), (low, high) != code_range(8)
    if zero is not None and zero.size == 1 and not form.signed:
        if narrow:  # bounds are whole numbers: clamped first, a value rounds to the same
            v = b.Clip(v, float(low - int(zero.item())), float(high - int(zero.item())))
        return [b.QuantizeLinear(v, 1.0, form.stored(zero.reshape(())))]
    if zero is not None and zero.ndim == 1 and form.matmul_integer:
        codes = b.QuantizeLinear(v, np.ones(len(zero), np.float32), form.stored(zero), axis=rank(x) - 2)
        if narrow:
            codes = b.Clip(codes, *(form.stored(np.array(bound)) for bound in (low, high)))
        return [codes]
    v = b.Add(b.Round(v), _rows(b, x, call["zero_point"]))
    if narrow:
        v = b.Clip(v, float(low), float(high))
    none = form.stored(np.array(0))
    codes = b.QuantizeLinear(v, 1.0, none)
    return [b.DequantizeLinear(codes, 1.0, none) if form.signed else codes]


def dequantize(b: Builder, call: Call, form: Form) -> list[ir.Value]:
    """(q - zero_point) · scale."""
    x = call["x_q"]
    zero = _rows(b, x, call["zero_point"])
    offset = b.Add(zero, float(form.zero)) if isinstance(zero, ir.Value) else zero + np.float32(form.zero)
    codes = x if form.signed else b.Cast(x, to=ir.DataType.FLOAT)
    return [b.Mul(b.Sub(codes, offset), _rows(b, x, call["scale"]))]


def choose_qparams(b: Builder, call: Call, form: Form) -> list[ir.Value]:
    """Scale and zero point (B, L) of every token, from its own minimum and maximum."""
    first, last = code_range(call.number("bits"))
    v = _smoothed(b, call)
    low, high = (b.op(f"Reduce{which}", v, [-1], keepdims=0) for which in ("Min", "Max"))
    low, high = b.Min(low, 0.0), b.Max(high, 0.0)
    scale = b.Max(b.Div(b.Sub(high, low), float(last - first)), float(EPSILON))
    zero = b.Clip(b.Sub(float(first), b.Round(b.Div(low, scale))), float(first), float(last))
    return [scale, b.Cast(zero, to=ir.DataType.INT32)]


def linear(b: Builder, call: Call, form: Form) -> list[ir.Value]:
    """(Σ q · w - z · Σ w) · scale · weight_scale + bias."""
    codes, bits4 = _weight(call)
    scale, zero = call.constant("x_scale"), call.constant("x_zero_point")
    weight = _stored(b, codes.T, bits4 and not form.signed, product=True)
    per_tensor = scale is not None and zero is not None and scale.size == zero.size == 1
    multiply = _matmul_integer if form.matmul_integer else _matmul
    y = multiply(b, call, form, weight, codes, per_tensor)
    if not per_tensor:
        y = b.Mul(y, _rows(b, call["x"], call["x_scale"]))
        if form.matmul_integer:
            y = b.Mul(y, call["weight_scale"])
    bias = call.get("bias")
    y = y if bias is None else b.Add(y, as_float(b, bias))
    wanted = ir.DataType(call.number("out_dtype"))
    return [y if wanted is ir.DataType.FLOAT else b.Cast(y, to=wanted)]


def dequantize_weight(b: Builder, call: Call, form: Form) -> list[ir.Value]:
    """The weight (N, …) of a product in floating point, of codes that a quantized linear may have as well.

    DequantizeLinear is for TensorRT alone: ONNX Runtime would make a product with inputs of 8 bits of it.
    """
    codes, scale = call.constant("input"), call.constant("scales")
    assert codes is not None and scale is not None
    if form.signed:
        zeros = np.zeros(len(scale), np.int8)
        return [b.DequantizeLinear(codes, scale.astype(np.float32), zeros, axis=call.number("axis"))]
    axis, last = call.number("axis"), codes.ndim - 1
    bits4 = call.number("quant_max") <= code_range(4)[1]
    weight = as_float(b, _stored(b, np.moveaxis(codes, axis, last), bits4, product=False))
    return [b.Transpose(b.Mul(weight, scale), perm=[*range(axis), last, *range(axis, last)])]


def _name(call: Call) -> str | None:
    """Returns the linear's name in the model, which its weight tells."""
    return (call["weight"].name or "").removesuffix(".weight_q") or None


def _stored(b: Builder, codes: np.ndarray, bits4: bool, product: bool) -> ir.Value:
    """Codes of a weight as int8; two of 4 bits share a byte of the file."""
    if not bits4:
        return b.constant(codes, weight=product)
    return b.Cast(b.constant(codes, ir.DataType.INT4, weight=product), to=ir.DataType.INT8)


def _weight(call: Call) -> tuple[np.ndarray, bool]:
    """Returns int8 codes (N, D), and whether they have 4 bits."""
    weight = call.constant("weight")
    assert weight is not None
    if weight.dtype != np.uint8:
        return weight.astype(np.int8), False
    return unpack_int4(torch.from_numpy(weight.copy()), size(call["x"], -1)).numpy(), True


def _total_scale(call: Call, per_tensor: bool) -> np.ndarray:
    scale, weight_scale = call.constant("x_scale"), call.constant("weight_scale")
    assert weight_scale is not None
    return (weight_scale * scale if per_tensor else weight_scale).astype(np.float32)


def _matmul_integer(
    b: Builder, call: Call, form: Form, weight: ir.Value, codes: np.ndarray, per_tensor: bool
) -> ir.Value:
    """The exact sums, int32, and the scales that all rows share."""
    x, zero = call["x"], call.constant("x_zero_point")
    if per_tensor:
        assert zero is not None
        sums = b.MatMulInteger(x, weight, form.stored(zero.reshape(())), node=_name(call))
        return b.Mul(b.Cast(sums, to=ir.DataType.FLOAT), _total_scale(call, True))
    offset: Operand
    if zero is None:
        offset = b.Add(b.Unsqueeze(call["x_zero_point"], [-1]), np.int32(form.zero))
    else:
        offset = np.atleast_1d(zero.astype(np.int32) + form.zero)[..., None]
    # a product of two constants, which would be larger than the weight
    sums = b.Sub(b.MatMulInteger(x, weight, node=_name(call)), b.Mul(offset, codes.sum(1, dtype=np.int32)))
    return b.Cast(sums, to=ir.DataType.FLOAT)


def _matmul(b: Builder, call: Call, form: Form, weight: ir.Value, codes: np.ndarray, per_tensor: bool) -> ir.Value:
    """The sums in floating point, of which runtimes make integer products, and the scales of the weight."""
    x, zero, scale = call["x"], call.constant("x_zero_point"), _total_scale(call, per_tensor)
    inside = zero if zero is not None and zero.size == 1 and not form.signed else np.array(0)
    values = x if form.signed else b.DequantizeLinear(x, 1.0, form.stored(inside.reshape(())))
    # TensorRT's rules are of zero points that are there
    zeros = [b.constant(np.zeros(len(scale), np.int8), weight=True)] if form.signed else []
    weights = b.DequantizeLinear(weight, scale, *zeros, axis=1)
    y = b.MatMul(values, weights, node=_name(call))
    if zero is not None and (inside == zero).all():
        return y
    sums = codes.sum(1, dtype=np.int32).astype(np.float32) * scale
    return b.Sub(y, b.Mul(_rows(b, x, call["x_zero_point"]), sums))


def rotate(b: Builder, call: Call, form: Form) -> list[ir.Value]:
    """Hadamard's transform of every run of 2^a channels, as two smaller ones, then Hartley's over the runs."""
    x = as_float(b, call["x"])
    channels = size(call["x"], -1)
    order = max(1, channels & -channels)
    runs, exponent = channels // order, order.bit_length() - 1
    left, right = 1 << exponent // 2, 1 << (exponent - exponent // 2)
    shape = [0] * (rank(call["x"]) - 1)
    y = b.MatMul(b.Reshape(x, [*shape, runs, left, right]), hadamard(right).numpy())
    y = b.MatMul(hadamard(left).numpy(), y)
    if 1 < runs <= LARGEST_HARTLEY:
        y = b.MatMul(hartley(runs).numpy(), b.Reshape(y, [*shape, runs, order]))
    y = b.Reshape(y, [*shape, channels])
    return [y if call["x"].dtype is ir.DataType.FLOAT else b.Cast(y, to=call["x"].dtype)]
