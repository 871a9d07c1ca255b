"""Inputs of operators."""

import torch

from helpers.strategies import integers, normal
from ptq4vm.ops import layouts as weight_layouts

library = torch.ops.ptq4vm


def quantize_inputs(images=2, tokens=3, channels=5, *, smooth=True, count=4, qparams="token", dtype=torch.float32):
    shape = {"tensor": (1,), "token": (tokens,), "image": (images, tokens)}[qparams]
    zero_point = integers(-8, 7, *shape, seed=3).int()
    inv_smooth = normal(channels, seed=1).exp() if smooth else None
    return normal(images, tokens, channels, dtype=dtype), normal(*shape, seed=2).exp(), zero_point, inv_smooth, count


def linear_inputs(images=2, tokens=3, channels=5, outputs=4, *, bias=True, packed=False, qparams="token"):
    _, scale, zero_point, _, _ = quantize_inputs(images, tokens, channels, qparams=qparams)
    weight = integers(-7, 7, outputs, channels, seed=1)
    return (
        integers(-8, 7, images, tokens, channels),
        scale,
        zero_point,
        weight_layouts.pack_int4(weight) if packed else weight,
        normal(outputs, seed=2).exp(),
        normal(outputs, seed=3) if bias else None,
        torch.float32,
    )


def scan_inputs(images=2, tokens=3, channels=4, states=2, *, optional=(True, True, True), dtype=torch.float32):
    D, z, bias = optional
    return (
        normal(images, tokens, channels, seed=1, dtype=dtype),
        normal(images, tokens, channels, seed=2, dtype=dtype),
        -normal(channels, states, seed=3, dtype=dtype).exp(),
        normal(images, tokens, states, seed=4, dtype=dtype),
        normal(images, tokens, states, seed=5, dtype=dtype),
        normal(channels, seed=6, dtype=dtype) if D else None,
        normal(images, tokens, channels, seed=7, dtype=dtype) if z else None,
        normal(channels, seed=8, dtype=dtype) if bias else None,
        True,
    )


def conv_inputs(images=2, tokens=5, channels=3, taps=4, *, bias=True, silu=True, dtype=torch.float32):
    x, weight = normal(images, tokens, channels, dtype=dtype), normal(channels, taps, seed=1, dtype=dtype)
    return x, weight, normal(channels, seed=2, dtype=dtype) if bias else None, silu


def with_gradient(inputs):
    """The inputs with their tensors as leaves."""
    return tuple(value.clone().requires_grad_() if isinstance(value, torch.Tensor) else value for value in inputs)
