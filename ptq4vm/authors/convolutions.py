"""Convolutions of `causal_conv1d` and `dwconv2d`: x (B, E, L) with weights (E, taps), or (B, E, H, W)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ptq4vm import ops
from ptq4vm.authors.refusals import refuse_arguments

_STATES = "a vision model has all its tokens at once"


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *others: Any, activation: str | None = None, **options: Any
) -> Tensor:
    """Computes the causal depth-wise convolution and SiLU; the activation is the fourth argument in old releases."""
    if [type(value) for value in others] == [str]:
        (activation,), others = others, ()
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    positional = dict(
        zip(("seq_idx", "initial_states", "return_final_states", "final_states_out"), others, strict=False)
    )
    refuse_arguments("causal_conv1d_fn", _STATES, **positional, **options)
    return _causal(x, weight, bias, activation is not None)


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    """Computes the convolution as the extension does: the last argument says whether SiLU follows."""
    *states, silu = others
    names = ("seq_idx", "initial_states", "final_states_out")
    refuse_arguments("causal_conv1d_fwd", _STATES, **dict(zip(names, states, strict=False)))
    return _causal(x, weight, bias, bool(silu))


def _causal(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return ops.causal_conv1d(x.transpose(1, 2), weight, bias, silu).transpose(1, 2)


def dwconv2d_fp32(x: Tensor, weight: Tensor, padding_height: int, padding_width: int) -> Tensor:
    return dwconv2dbias_fp32(x, weight, None, padding_height, padding_width)


def dwconv2dbias_fp32(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding_height: int, padding_width: int
) -> Tensor:
    """Computes a depth-wise convolution with weights (E, 1, kH, kW)."""
    return F.conv2d(x, weight, bias, padding=(padding_height, padding_width), groups=weight.shape[0])


class DepthwiseFunction:
    """Has the call of `Dwconv.dwconv_layer.DepthwiseFunction`, which is an autograd function there."""

    @staticmethod
    def apply(
        x: Tensor, weight: Tensor, bias: Tensor | None, padding_height: int, padding_width: int, has_bias: bool
    ) -> Tensor:
        return dwconv2dbias_fp32(x, weight, bias if has_bias else None, padding_height, padding_width)


class DwConv2d(nn.Conv2d):
    """A depth-wise convolution with the arguments of `Dwconv.dwconv_layer.DwConv2d`."""

    def __init__(
        self, num_channel: int, kernel_size: tuple[int, int], padding: tuple[int, int], bias: bool = True
    ) -> None:
        super().__init__(num_channel, num_channel, kernel_size, padding=padding, groups=num_channel, bias=bias)
