"""The reference on another device: its results are there, with the shapes, types and strides of those of the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.strategies import integers, normal
from torch import Tensor

from ptq4vm.ops import convolution_1d, fake_quantization, layouts, linears, quantization, rotation, scans

TOKENS = normal(3, seed=1).exp()
ZERO_POINT = integers(-4, 3, 3, seed=2).int()
X, CODES, WEIGHT = normal(2, 3, 12), integers(-8, 7, 2, 3, 12), integers(-7, 7, 5, 12)
SCAN = (
    X, normal(2, 3, 12, seed=3), -normal(12, 4, seed=4).exp(), normal(2, 3, 4, seed=5), normal(2, 3, 4, seed=6),
    normal(12, seed=7), normal(2, 3, 12, seed=8), normal(12, seed=9), True,
)  # fmt: skip
CONVOLUTION = (X, normal(12, 4), normal(12), True)
FAKE = (X, TOKENS, ZERO_POINT, normal(12).exp(), 4)
CALLS: dict[Callable[..., Any], tuple[Any, ...]] = {
    quantization.quantize: (X, TOKENS, ZERO_POINT, normal(12), 4),
    quantization.dequantize: (CODES, TOKENS, ZERO_POINT),
    rotation.rotate: (X,),
    quantization.quantize_weight: (normal(5, 12), normal(5).exp(), 4),
    quantization.affine_qparams: (-TOKENS, TOKENS, 4),
    quantization.choose_qparams: (X, normal(12), 4),
    linears.accumulate: (CODES, ZERO_POINT, WEIGHT),
    linears.linear: (CODES, TOKENS, ZERO_POINT, layouts.pack_int4(WEIGHT), normal(5).exp(), normal(5), torch.float32),
    layouts.pack_int4: (CODES,),
    fake_quantization.fake_quantize: FAKE,
    fake_quantization.fake_quantize_backward: (X, *FAKE, True, True, True, True),
    convolution_1d.causal_conv1d: CONVOLUTION,
    convolution_1d.causal_conv1d_backward: (X, *CONVOLUTION),
    scans.selective_scan: SCAN,
    scans.selective_scan_quantized: (*SCAN, TOKENS, 1 / TOKENS, 4),
    scans.selective_scan_backward: (X, *SCAN),
}


def results(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    found = function(*arguments)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_results_are_where_the_inputs_are(function):
    moved = tuple(value.to("meta") if isinstance(value, Tensor) else value for value in CALLS[function])
    for here, there in zip(results(function, CALLS[function]), results(function, moved), strict=True):
        assert there.device.type == "meta"
        assert (there.shape, there.dtype, there.stride()) == (here.shape, here.dtype, here.stride())


@pytest.mark.parametrize("make", [rotation.hadamard, rotation.hartley])
def test_matrices_are_made_where_they_are_used(make):
    assert make(4, torch.device("meta")).device.type == "meta"
    assert torch.equal(make(4), make(4, torch.device("cpu")))
