"""Causal depth-wise convolutions of tokens, alone or along K scan directions in one pass with SiLU and the codes.

Shapes: B images, L tokens, E channels, K directions. Directions do not move tokens: every tensor keeps them in their
natural (row-major) order, and `order` (K, L) says which token each direction reads at its t-th step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm.ops._arguments import Values, check_order
from ptq4vm.ops._define import adjoint, define, empty_gradient, like
from ptq4vm.ops.quantization import QPARAMS, QParams, quantize

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu"
_SHAPES = "x float B L E; weight float E taps; bias float E"
DIRECTIONS_SHAPES = "inv_scale float K L|1; zero_point zeros =inv_scale; inv_smooth float K E; bits bits"


def _check_taps(values: Values) -> None:
    if values["weight"].shape[-1] < 1:
        raise ValueError("a convolution needs at least one tap")


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Computes depth-wise y_t = b + Σ_k w_k · x_{t-K+1+k}, zeros before t = 0; x (B, L, E), weight (E, K), bias (E,).

    Computed in float32 (float64 for float64 inputs) and returned in x's dtype.
    """
    y = _taps(*_in_one_type(x, weight, bias))
    return (F.silu(y) if silu else y).to(x.dtype).contiguous()


def _in_one_type(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    kind = torch.promote_types(x.dtype, torch.float32)
    return x.to(kind), *(None if value is None else value.to(kind) for value in others)


def _taps(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    taps, tokens = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = padded[:, :tokens] * weight[:, 0]
    for k in range(1, taps):
        y = torch.addcmul(y, padded[:, k : k + tokens], weight[:, k])
    return y if bias is None else y + bias


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of x, weight and bias, empty without one, in their dtypes: the adjoint of `causal_conv1d`."""
    dtypes, taps, tokens = (x.dtype, weight.dtype), weight.shape[1], x.shape[1]
    bias_dtype = grad.dtype if bias is None else bias.dtype
    x, grad, weight, bias = _in_one_type(x, grad, weight, bias)
    if silu:
        grad = grad * silu_slope(_taps(x, weight, bias))
    x_padded, grad_padded = F.pad(x, (0, 0, taps - 1, 0)), F.pad(grad, (0, 0, 0, taps - 1))
    grad_x = grad_padded[:, taps - 1 : taps - 1 + tokens] * weight[:, 0]
    for k in range(1, taps):
        grad_x = torch.addcmul(grad_x, grad_padded[:, taps - 1 - k : taps - 1 - k + tokens], weight[:, k])
    grad_weight = torch.stack([(grad * x_padded[:, k : k + tokens]).sum((0, 1)) for k in range(taps)], -1)
    grad_bias = grad.new_empty(0) if bias is None else grad.sum((0, 1))
    return grad_x.to(dtypes[0]).contiguous(), grad_weight.to(dtypes[1]), grad_bias.to(bias_dtype)


def silu_slope(x: Tensor) -> Tensor:
    """Returns the derivative of SiLU at x."""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _quantize_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[0], *x.shape)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int8)


def conv1d_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, *qparams: *QParams
) -> tuple[Tensor, Tensor]:
    """Returns K causal convolutions and SiLU along K orders of the tokens of x (B, L, E), and codes: both (K, B, L, E).

    weight (K, E, taps), bias (K, E), order (K, L) permutations, inv_smooth (K, E). The first result has x's dtype; the
    codes are those of the float32 values.
    """
    outputs = []
    for k, tokens in enumerate(order.long().unbind(0)):
        y = causal_conv1d(x[:, tokens].float(), weight[k], None if bias is None else bias[k], True)
        outputs.append(torch.empty_like(y).index_copy_(1, tokens, y))
    y = torch.stack(outputs)
    return y.to(x.dtype), directions_codes(y, *qparams)


def directions_codes(y: Tensor, *qparams: *QParams) -> Tensor:
    """Returns codes (K, B, L, E) of y, (K, B, L, E) or (1, B, L, E) for all directions; inv_scale (K, L) or (K, 1)."""
    inv_scale, zero_point, inv_smooth, bits = qparams
    smooth = None if inv_smooth is None else inv_smooth[:, None, None]
    return quantize(y, inv_scale.unsqueeze(1), zero_point.unsqueeze(1), smooth, bits)


define(
    f"causal_conv1d({_INPUTS}) -> Tensor",
    causal_conv1d,
    _SHAPES,
    like,
    checks=(_check_taps,),
    gradient=adjoint("causal_conv1d_backward"),
)
define(
    f"causal_conv1d_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    causal_conv1d_backward,
    f"{_SHAPES}; grad float B L E",
    lambda grad, x, weight, bias, silu: tuple(empty_gradient(value, grad) for value in (x, weight, bias)),
    checks=(_check_taps,),
)
define(
    f"conv1d_quantize(Tensor x, Tensor weight, Tensor? bias, Tensor order, {QPARAMS}) -> (Tensor, Tensor)",
    conv1d_quantize,
    f"x float B L E; weight float K E taps; bias float K E; order order K L; {DIRECTIONS_SHAPES}",
    _quantize_fake,
    checks=(_check_taps, lambda values: check_order(values["order"], values["x"].shape[1], least=0)),
)
