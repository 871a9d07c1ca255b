"""What the operators ask of their arguments, said once: the Python side of csrc/bindings, which asks the same.

`check` runs before every implementation in Python, so that a user without a compiler reads the same refusals; shapes
are those of `reference` and `fused`. Values (zero points, orders, sums) are read on the CPU only: a GPU would wait.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int8, torch.int16, torch.uint8)
WEIGHTS = (torch.int8, torch.uint8)

DTYPES = {
    "float": FLOATS,
    "number": FLOATS + INTEGERS,
    "codes": (torch.int8,),
    "weight": WEIGHTS,
    "zeros": INTEGERS,
    "sums": INTEGERS,
    "order": INTEGERS,
}
"""The kinds of arguments: zeros are zero points within int8, sums those of a weight's codes."""

MOST_CHANNELS = 2**16 - 1
"""So many products of int8 codes have an int32 sum."""

MOST_RANK = 512

MOST_TOKENS = 2**24
"""Of an order, whose tokens are counted."""

_QPARAMS = "inv_scale float tokens; zero_point zeros =inv_scale; inv_smooth float D; bits bits"
_DIRECTIONS = "inv_scale float K L|1; zero_point zeros =inv_scale; inv_smooth float K E; bits bits"
_SCAN = (
    "u float B L E; delta float B L E; A float E S; B float B L S; C float B L S; D float E; z float B L E; "
    "delta_bias float E"
)
_CONV = "x float B L E; weight float E taps; bias float E"
_FAKE = "x float ... D; scale float tokens; zero_point number =scale; smooth float D; bits bits"
_LINEAR = (
    "x codes ... D; x_scale float tokens; x_zero_point zeros =x_scale; weight weight *; weight_scale float N; "
    "weight_sum sums N; bias float N"
)
_STACKED = (
    "x codes K ... D; x_scale float K tokens; x_zero_point zeros =x_scale; weight weight *; weight_scale float K N; "
    "weight_sum sums K N; bias float K N"
)
_STEPS = (
    "order order K T; u float K|1 B L E; projected float K B L P; A float K E S; step_inv_scale float K L|1; "
    "step_scale float =step_inv_scale; step_zero_point zeros =step_inv_scale; step_bits bits; step_weight weight *; "
    "step_weight_sum sums K E; step_weight_scale float K E; step_bias float K E; D float K E; z float B L E"
)

ARGUMENTS = {
    "quantize": f"x float ... D; {_QPARAMS}",
    "choose_qparams": "x float ... D; inv_smooth float D; bits bits",
    "dequantize": "x_q codes ... D; scale float tokens; zero_point zeros =scale",
    "rotate": "x float ... D",
    "rotate_quantize": f"x float ... D; {_QPARAMS}",
    "norm_quantize": f"x float ... D; residual float =x; weight float D; bias float D; {_QPARAMS}",
    "linear": "x codes ... D; x_scale float tokens; x_zero_point zeros =x_scale; weight weight N *; "
    "weight_scale float N; bias float N",
    "linear_packed": _LINEAR,
    "linear_gelu_quantize": _LINEAR + "; inv_scale float tokens; zero_point zeros =inv_scale; inv_smooth float N; "
    "bits bits",
    "selective_scan": _SCAN,
    "selective_scan_backward": f"{_SCAN}; grad float B L E",
    "selective_scan_quantized": f"{_SCAN}; state_scale float L|1; state_inv_scale float =state_scale; bits bits",
    "causal_conv1d": _CONV,
    "causal_conv1d_backward": f"{_CONV}; grad float B L E",
    "fake_quantize": _FAKE,
    "fake_quantize_backward": f"{_FAKE}; grad float =x",
    "conv1d_quantize": f"x float B L E; weight float K E taps; bias float K E; order order K L; {_DIRECTIONS}",
    "conv2d_quantize": f"x float B L E; weight float E rows columns; bias float E; {_DIRECTIONS}",
    "directional_scan": _STEPS,
    "directional_scan_quantize": _STEPS + "; inv_scale float L|1; zero_point zeros =inv_scale; inv_smooth float E; "
    "bits bits",
}
"""Each argument's kind and shape. A size is a letter that stands for the same number everywhere, `L|1` either of the
two, `...` any axes, `*` a shape that another check knows, `=other` the shape of another argument, and `tokens` what
scales of the operator's input are: (1,), (L,), or the input's shape without channels."""


def names_of(schema: str) -> tuple[str, ...]:
    """The arguments' names; those that may be None end in a question mark."""
    parsed = torch._C.parse_schema(f"ptq4vm::{schema}").arguments
    return tuple(f"{each.name}{'?' * isinstance(each.type, torch.OptionalType)}" for each in parsed)


def check_placement(name: str, names: Sequence[str], arguments: Sequence[Any], gradients: bool) -> None:
    """Checks that all tensors are there and lie in strides on one device, and with `gradients` that none requires one.

    Raises ValueError for the first, and RuntimeError for the second: the operator has no gradient.
    """
    first: Tensor | None = None
    for argument, value in zip(names, arguments, strict=True):
        if value is None and not argument.endswith("?"):
            raise ValueError(f"ptq4vm::{name}: {argument} is None, it must be a tensor")
        if not isinstance(value, Tensor):
            continue
        argument = argument.rstrip("?")
        first = value if first is None else first
        if value.device != first.device:
            raise ValueError(
                f"ptq4vm::{name}: all tensors must be on one device: the first is on {first.device}, another on "
                f"{value.device}, {argument}; move the model and its inputs with .to(device)"
            )
        if value.layout is not torch.strided:
            raise ValueError(f"ptq4vm::{name}: {argument} is sparse: call .to_dense()")
        if gradients and value.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"ptq4vm::{name}: the operator has no gradient, and {argument} requires one: call it under "
                "torch.no_grad(), or take gradients of the prepared model"
            )


def check(name: str, names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Raises ValueError for dtypes, shapes and values that the operator does not take."""
    values = dict(zip((each.rstrip("?") for each in names), arguments, strict=True))
    try:
        stacked = name.startswith("linear_") and values["weight_scale"].dim() == 2
        if stacked and name == "linear_gelu_quantize":
            raise ValueError(f"a GELU follows one linear, not {len(values['weight_scale'])} stacked ones")
        _check_tensors(_parsed(_STACKED if stacked else ARGUMENTS[name]), values)
        for more in _MORE.get(name, ()):
            more(values)
    except ValueError as error:
        raise ValueError(f"ptq4vm::{name}: {error}") from None


@functools.cache
def _parsed(text: str) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    return tuple((words[0], words[1], tuple(words[2:])) for words in map(str.split, text.split("; ")))


def _check_tensors(specification: Sequence[tuple[str, str, tuple[str, ...]]], values: dict[str, Any]) -> None:
    sizes: dict[str, int] = {}
    first = values[next(name for name, *_ in specification if name.startswith(("x", "u")))]
    for name, kind, axes in specification:
        value = values[name]
        if kind == "bits":
            if not 2 <= value <= 8:
                raise ValueError(f"bits must be between 2 and 8, got {value}")
            continue
        if value is None:
            continue
        if value.dtype not in DTYPES[kind]:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[kind])
            raise ValueError(f"{name} must be {wanted}, it is {str(value.dtype).removeprefix('torch.')}")
        if axes[-1] == "tokens":
            check_scales(first, value, stacked=len(axes) > 1)
        elif axes[0].startswith("="):
            _check_same(name, value, values[axes[0][1:]])
        else:
            _check_axes(name, value, axes, sizes)
        if value.device.type == "cpu":
            _check_values(name, kind, value)


def _check_same(name: str, value: Tensor, other: Tensor) -> None:
    if "zero_point" in name and value.numel() != other.numel():
        raise ValueError(f"{name}: there are {other.numel()} scales and {value.numel()} zero points")
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has another shape than the other arguments ask for: {tuple(value.shape)}, not {tuple(other.shape)}"
        )


def _check_axes(name: str, value: Tensor, axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    if axes == ("*",):
        return
    if "..." in axes:
        at = axes.index("...")
        axes = (*axes[:at], *("_" * (value.dim() - len(axes) + 1)), *axes[at + 1 :])
        if "*" not in axes and value.dim() < len(axes):
            raise ValueError(f"{name} needs {len(axes)} axes or more, its shape is {tuple(value.shape)}")
    if value.dim() != len(axes):
        raise ValueError(f"{name} must be ({', '.join(axes)}), its shape is {tuple(value.shape)}")
    wanted = [_size(axis, have, sizes) for axis, have in zip(axes, value.shape, strict=True)]
    if list(value.shape) != wanted:
        raise ValueError(
            f"{name} has another shape than the other arguments ask for: {tuple(value.shape)}, not {tuple(wanted)}"
        )


def _size(axis: str, have: int, sizes: dict[str, int]) -> int:
    """The size that an axis should have; its own where nothing is known of it."""
    if axis in ("_", "*"):
        return have
    if axis.endswith("|1"):
        return 1 if have == 1 else sizes[axis[0]]
    return sizes.setdefault(axis, have)


def check_scales(x: Tensor, scale: Tensor, stacked: bool = False) -> None:
    """Raises ValueError unless scales are per tensor (1,), per token (L,) or per image and token (B, L) of x.

    Stacked: x and its scales have an axis of directions before these.
    """
    if stacked and (scale.dim() < 1 or scale.shape[0] != x.shape[0]):
        raise ValueError(f"scales of {len(x)} stacked inputs need as many, their shape is {tuple(scale.shape)}")
    own, inputs = scale.shape[stacked:], x.shape[stacked:-1]
    tokens = inputs[-1] if inputs else 1
    if len(own) == 1 and own[0] not in (1, tokens):
        raise ValueError(
            f"token scales were calibrated for {own[0]} tokens, the input has {tokens}; "
            "calibrate at this resolution or use Granularity.PER_TENSOR"
        )
    if len(own) != 1 and own != inputs:
        raise ValueError(
            f"scales of shape {tuple(scale.shape)} do not fit an input of shape {tuple(x.shape)}: they need its shape "
            "without the last axis"
        )


def _check_values(name: str, kind: str, value: Tensor) -> None:
    if kind == "zeros":
        value = value.long()
        wrong = value[(value < -128) | (value > 127)]
        if len(wrong):
            raise ValueError(f"{name}: zero points are int8 codes, one is {int(wrong[0])}")


def _check_order(values: dict[str, Any], tokens: int, least: int) -> None:
    order = values["order"].long()
    if order.device.type != "cpu":
        return
    if order.numel() and tokens > MOST_TOKENS:
        raise ValueError(f"an order is of at most {MOST_TOKENS} tokens, not {tokens}")
    wrong = order[(order < least) | (order >= tokens)]
    if len(wrong):
        raise ValueError(
            f"the order of {tokens} tokens names token {int(wrong[0])}, which is not between {least} and {tokens - 1}"
        )
    if not order.numel():
        return
    ordered = order.sort(-1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(twice):
        direction, at = twice[0].tolist()
        raise ValueError(f"the order of direction {direction} names token {int(ordered[direction, at])} twice")


def _check_permutation(values: dict[str, Any]) -> None:
    _check_order(values, values["x"].shape[1], 0)


def _check_taps(values: dict[str, Any]) -> None:
    if values["weight"].shape[-1] < 1:
        raise ValueError("a convolution needs at least one tap")


def _check_channels(values: dict[str, Any]) -> None:
    if not values["x"].shape[-1]:
        raise ValueError("x needs channels: no token has a range without them")


def _check_norm(values: dict[str, Any]) -> None:
    if values["rms"] and values["bias"] is not None:
        raise ValueError("an RMS norm has no bias")


def _check_needs(values: dict[str, Any]) -> None:
    for name, what in (("smooth", "smoothing"), ("zero_point", "zero point")):
        if values[name] is None and values[f"need_{name}"]:
            raise ValueError(f"there is no {what} whose gradient could be given")


def _check_map(values: dict[str, Any]) -> None:
    height, width, tokens = values["height"], values["width"], values["x"].shape[1]
    if height < 0 or width < 0:
        raise ValueError(f"height and width must not be negative, they are {height} and {width}")
    if height * width != tokens:
        raise ValueError(f"a map of height {height} and width {width} has not the {tokens} tokens of x")
    rows, columns = values["weight"].shape[1:]
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(f"a kernel of {rows} by {columns} has no middle: both must be odd")


def _check_out_dtype(values: dict[str, Any]) -> None:
    if values["out_dtype"] not in FLOATS:
        raise ValueError(f"out_dtype must be float32, bfloat16, float16 or float64, it is {values['out_dtype']}")


def _check_plain_weight(values: dict[str, Any]) -> None:
    _check_most_channels(values)
    check_weight(values["x"], values["weight"])


def check_weight(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless a plain weight has the columns of x's channels."""
    packed = weight.dtype == torch.uint8
    wanted = (x.shape[-1] + 1) // 2 if packed else x.shape[-1]
    if weight.shape[-1] != wanted:
        kind = "packed 4-bit" if packed else "int8"
        raise ValueError(
            f"a {kind} weight for {x.shape[-1]} channels has {wanted} columns, this one {weight.shape[-1]}"
        )


def _check_most_channels(values: dict[str, Any]) -> None:
    if (channels := values["x"].shape[-1]) > MOST_CHANNELS:
        raise ValueError(f"sums of {channels} products of int8 codes may not fit int32")


def _check_packed_weight(values: dict[str, Any]) -> None:
    _check_most_channels(values)
    weight, channels, stack = values["weight"], values["x"].shape[-1], tuple(values["weight_scale"].shape[:-1])
    features, packed = values["weight_scale"].shape[-1], weight.dtype == torch.uint8
    step = 32 if packed else 16
    rows = (*stack, features, math.ceil(channels / step) * 16)
    tiles = (*stack, math.ceil(features / 16), math.ceil(channels / 64), 16, 32 if packed else 64)
    if tuple(weight.shape) not in (rows, tiles):
        raise ValueError(
            f"a weight of {features} × {channels} channels is packed into {tiles[len(stack) :]} {weight.dtype}, this "
            f"one is {tuple(weight.shape)}; pack it with ptq4vm.fused.pack_weight"
        )
    _check_sums("weight_sum", values["weight_sum"], channels)


def _check_sums(name: str, sums: Tensor, channels: int) -> None:
    if sums.device.type != "cpu":
        return
    sums = sums.long()
    wrong = sums[(sums < -128 * channels) | (sums > 128 * channels)]
    if len(wrong):
        raise ValueError(
            f"{name} has the value {int(wrong[0])}, but the sum of {channels} codes is between {-128 * channels} and "
            f"{128 * channels}"
        )


def _check_directions(values: dict[str, Any]) -> None:
    projected, weight = values["projected"], values["step_weight"]
    (directions, channels, states), tokens = values["A"].shape, projected.shape[2]
    rank = projected.shape[-1] - 2 * states
    if not directions:
        raise ValueError("the order (K, T) has no direction")
    if not 1 <= rank <= MOST_RANK:
        raise ValueError(
            f"projected has {projected.shape[-1]} channels: with {states} states that leaves {rank} for the step, "
            f"which must be between 1 and {MOST_RANK}"
        )
    columns = 32 if weight.dtype == torch.uint8 else 64
    wanted = (directions, math.ceil(channels / 16), math.ceil(rank / 64), 16, columns)
    smooth = values["step_inv_smooth"]
    for name, value, shape in (("step_weight", weight, wanted), ("step_inv_smooth", smooth, (directions, rank))):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has another shape than the other arguments ask for: {tuple(value.shape)}, not {shape}"
            )
    if smooth is not None and smooth.dtype not in FLOATS:
        raise ValueError(f"step_inv_smooth must be a float, it is {smooth.dtype}")
    _check_sums("step_weight_sum", values["step_weight_sum"], rank)
    _check_order(values, tokens, -1)


_MORE = {
    "choose_qparams": (_check_channels,),
    "norm_quantize": (_check_norm,),
    "linear": (_check_out_dtype, _check_plain_weight),
    "linear_packed": (_check_out_dtype, _check_packed_weight),
    "linear_gelu_quantize": (_check_packed_weight,),
    "causal_conv1d": (_check_taps,),
    "causal_conv1d_backward": (_check_taps,),
    "conv1d_quantize": (_check_taps, _check_permutation),
    "conv2d_quantize": (_check_map,),
    "fake_quantize_backward": (_check_needs,),
    "directional_scan": (_check_directions,),
    "directional_scan_quantize": (_check_directions,),
}
