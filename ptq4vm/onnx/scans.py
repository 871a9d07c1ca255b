"""The selective scan and the causal convolution in stock operators of ONNX.

u, delta, z (B, L, E); A (E, S); B, C (B, L, S). A graph has no recurrence but Scan, whose every step costs
microseconds: a step takes several tokens at once.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ptq4vm.onnx.builder import Builder, Operand
from ptq4vm.onnx.calls import Call, size
from ptq4vm.onnx.quantization import Form, as_float
from ptq4vm.ops.quantization import code_range

BLOCK = 8
"""Tokens of a step of a scan with several states."""


def causal_conv1d(b: Builder, call: Call, form: Form) -> list[ir.Value]:
    """Depth-wise y_t = b + Σ_k w_k · x_{t-K+1+k}, then SiLU if asked for."""
    channels, taps = size(call["weight"], 0), size(call["weight"], 1)
    weight = b.Unsqueeze(as_float(b, call["weight"]), [1])
    bias = call.get("bias")
    x = b.Transpose(as_float(b, call["x"]), perm=[0, 2, 1])
    y = b.Conv(x, weight, bias if bias is None else as_float(b, bias), group=channels, pads=[taps - 1, 0])
    y = b.Transpose(y, perm=[0, 2, 1])
    return [_as(b, silu(b, y) if call.number("silu") else y, call["x"])]


def silu(b: Builder, x: ir.Value) -> ir.Value:
    return b.Mul(x, b.Sigmoid(x))


def softplus(b: Builder, x: ir.Value) -> ir.Value:
    """log(1 + exp(x)) of operators that runtimes have vectorized, which Softplus is not in ONNX Runtime."""
    return b.Add(b.Relu(x), b.Log(b.Add(b.Exp(b.Neg(b.Abs(x))), 1.0)))


def _as(b: Builder, y: ir.Value, x: ir.Value) -> ir.Value:
    return y if x.dtype is ir.DataType.FLOAT else b.Cast(y, to=x.dtype)


class _Inputs:
    """Δ and what it makes of u, (B, L, E), B, C, and A (S, E)."""

    def __init__(self, b: Builder, call: Call) -> None:
        self.tokens, self.channels = size(call["u"], 1), size(call["u"], 2)
        self.states = size(call["A"], 1)
        self.u = as_float(b, call["u"])
        bias = call.get("delta_bias")
        raw = as_float(b, call["delta"])
        raw = raw if bias is None else b.Add(raw, as_float(b, bias))
        self.dt = softplus(b, raw) if call.number("delta_softplus") else raw
        self.dt_u = b.Mul(self.dt, self.u)
        self.b, self.c = (as_float(b, call[name]) for name in ("B", "C"))
        a = call.constant("A")
        self.a: Operand = a.T.astype(np.float32) if a is not None else b.Transpose(as_float(b, call["A"]), perm=[1, 0])

    def finish(self, b: Builder, call: Call, y: ir.Value) -> list[ir.Value]:
        """Adds D · u and multiplies by SiLU(z)."""
        d, z = call.get("D"), call.get("z")
        y = y if d is None else b.Add(y, b.Mul(self.u, as_float(b, d)))
        y = y if z is None else b.Mul(y, silu(b, as_float(b, z)))
        return [_as(b, y, call["u"])]


def selective_scan(b: Builder, call: Call, form: Form) -> list[ir.Value]:
    """h_t = exp(Δ_t · A) · h_{t-1} + Δ_t · B_t · u_t,  y_t = (Σ_s C_t · h_t + D · u_t) · silu(z_t)."""
    inputs = _Inputs(b, call)
    return inputs.finish(b, call, _blocks(b, inputs) if inputs.states > 1 else _chunks(b, inputs))


def _runs(b: Builder, x: ir.Value, tokens: int, length: int, perm: list[int]) -> ir.Value:
    """(B, L, X) → (B, ceil(L / length), length, X), padded with zeros, then permuted."""
    if pad := -tokens % length:
        x = b.Pad(x, [0, 0, 0, 0, pad, 0])
    return b.Transpose(b.Reshape(x, [0, -(-tokens // length), length, -1]), perm=perm)


def _blocks(b: Builder, inputs: _Inputs) -> ir.Value:
    """A Scan over blocks of tokens, with the tokens of a block one after the other in its body.

    A body takes apart what is small, Δ and not exp(Δ · A): no state is copied, and
    a token stays in the cache at any batch.
    """
    length, sequences = min(BLOCK, inputs.tokens), (inputs.dt, inputs.dt_u, inputs.b, inputs.c)
    dt, dt_u, b_t, c_t = (_runs(b, x, inputs.tokens, length, [1, 2, 0, 3]) for x in sequences)
    blocks = [b.Unsqueeze(x, [axis]) for x, axis in ((dt, 3), (dt_u, 3), (b_t, 4), (c_t, 3))]
    body = Builder()
    state, *values = [ir.val(name, ir.DataType.FLOAT) for name in ("h", "dt", "dt_u", "b", "c")]
    inner, results = [state, *values], []
    for step, step_u, taken, read in zip(
        *(body.several("Split", length, x, axis=0, num_outputs=length) for x in values), strict=True
    ):  # (1, B, S, E)
        decay = body.Exp(body.Mul(step, inputs.a))
        state = body.Add(body.Mul(decay, state), body.Mul(step_u, taken))
        results.append(body.MatMul(read, state))
    start = b.Mul(b.Slice(b.Gather(blocks[0], 0, axis=0), [0], [1], [0]), np.zeros((inputs.states, 1), np.float32))
    _, y = b.scan(body, inner, [state, body.Concat(*results, axis=0)], [start], blocks)
    y = b.Reshape(b.Transpose(b.Squeeze(y, [3]), perm=[2, 0, 1, 3]), [0, -1, inputs.channels])
    return b.Slice(y, [0], [inputs.tokens], [1]) if inputs.tokens % length else y


def _chunks(b: Builder, inputs: _Inputs) -> ir.Value:
    """√L chunks side by side, each from a state of zeros; then the states between them, and what they add."""
    tokens = inputs.tokens
    count = max(1, round(math.sqrt(tokens)))
    length = -(-tokens // count)
    dt, dt_u, b_t, c_t = (
        _runs(b, x, tokens, length, [2, 0, 1, 3]) for x in (inputs.dt, inputs.dt_u, inputs.b, inputs.c)
    )
    decay = b.Exp(b.Mul(dt, inputs.a))  # (T, B, n, E)
    added = b.Mul(dt_u, b_t)
    zero = b.Mul(b.Gather(decay, 0, axis=0), 0.0)
    body = Builder()
    h, p, factor, term = values = [ir.val(name, ir.DataType.FLOAT) for name in ("h", "p", "factor", "term")]
    state, product = body.Add(body.Mul(factor, h), term), body.Mul(factor, p)
    outputs = [state, product, body.Identity(state), body.Identity(product)]
    ends, products, states, decays = b.scan(body, values, outputs, [zero, b.Add(zero, 1.0)], [decay, added])
    carry = _carried(b, b.Transpose(products, perm=[1, 0, 2]), b.Transpose(ends, perm=[1, 0, 2]))
    states = b.Add(states, b.Mul(decays, b.Unsqueeze(b.Transpose(carry, perm=[1, 0, 2]), [0])))
    y = b.Reshape(b.Transpose(b.Mul(states, c_t), perm=[1, 2, 0, 3]), [0, -1, inputs.channels])
    return b.Slice(y, [0], [tokens], [1]) if length * -(-tokens // length) > tokens else y


def _carried(b: Builder, products: ir.Value, ends: ir.Value) -> ir.Value:
    """The state before each chunk, (n, B, E)."""
    body = Builder()
    h, factor, term = values = [ir.val(name, ir.DataType.FLOAT) for name in ("h", "factor", "term")]
    outputs = [body.Add(body.Mul(factor, h), term), body.Identity(h)]
    zero = b.Mul(b.Gather(ends, 0, axis=0), 0.0)
    _, before = b.scan(body, values, outputs, [zero], [products, ends])
    return before


def selective_scan_quantized(b: Builder, call: Call, form: Form) -> list[ir.Value]:
    """`selective_scan` whose state is rounded to codes between tokens; y reads it before."""
    inputs = _Inputs(b, call)
    low, high = code_range(call.number("bits"))
    tokens = inputs.tokens
    scales, inverses = (
        np.broadcast_to(value.astype(np.float32), (tokens,)).reshape(tokens, 1, 1, 1)
        for value in (call.constant("state_scale"), call.constant("state_inv_scale"))
        if value is not None
    )
    first = [b.Transpose(x, perm=[1, 0, 2]) for x in (inputs.dt, inputs.dt_u, inputs.b, inputs.c)]
    body = Builder()
    names = ("h", "dt", "dt_u", "b", "c", "scale", "inv_scale")
    h, dt, dt_u, b_t, c_t, scale, inverse = values = [ir.val(name, ir.DataType.FLOAT) for name in names]
    decay = body.Exp(body.Mul(body.Unsqueeze(dt, [1]), inputs.a))  # (B, S, E)
    v = body.Add(body.Mul(decay, h), body.Mul(body.Unsqueeze(dt_u, [1]), body.Unsqueeze(b_t, [2])))
    y = body.Squeeze(body.MatMul(body.Unsqueeze(c_t, [1]), v), [1])
    state = body.Mul(body.Clip(body.Round(body.Mul(v, inverse)), float(low), float(high)), scale)
    start = b.Mul(b.Unsqueeze(b.Mul(b.Gather(first[0], 0, axis=0), 0.0), [1]), np.zeros((inputs.states, 1), np.float32))
    _, y = b.scan(body, values, [state, y], [start], [*first, b.value(scales), b.value(inverses)])
    return inputs.finish(b, call, b.Transpose(y, perm=[1, 0, 2]))
