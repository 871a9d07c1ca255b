"""The causal convolution and its gradient against torch's."""

import pytest
import torch
import torch.nn.functional as F
from helpers.references import close
from helpers.strategies import integers, layouts, normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq4vm.ops import convolution_1d


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    taps, channels = weight.shape[1], weight.shape[0]
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=taps - 1, groups=channels)
    y = y[..., : x.shape[1]].transpose(1, 2)
    return F.silu(y) if silu else y


CONV_SHAPES = [(2, 17, 5, 4), (1, 1, 3, 4), (2, 2, 1, 4), (2, 3, 4, 1), (3, 50, 8, 3)]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_the_convolution_is_torchs(shape, has_bias, silu):
    images, tokens, channels, taps = shape
    x, weight = integers(-8, 7, images, tokens, channels).float(), integers(-8, 7, channels, taps, seed=1).float()
    bias = integers(-8, 7, channels, seed=2).float() if has_bias else None
    # whole numbers have exact sums in any order; silu of equal numbers is equal up to its vectorised form
    assert torch.equal(convolution_1d.causal_conv1d(x, weight, bias, False), plain_conv(x, weight, bias, False))
    ours, theirs = (conv(x / 8, weight / 8, bias, silu) for conv in (convolution_1d.causal_conv1d, plain_conv))
    assert ours.is_contiguous()
    assert close(ours, theirs.contiguous(), 1e-6)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_the_convolutions_gradient_is_torchs(shape, has_bias, silu):
    images, tokens, channels, taps = shape
    x, weight = (
        normal(images, tokens, channels, dtype=torch.float64),
        normal(channels, taps, seed=1, dtype=torch.float64),
    )
    bias = normal(channels, seed=2, dtype=torch.float64) if has_bias else None
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias) if value is not None]
    y = plain_conv(*leaves, *(() if has_bias else (None,)), silu)
    grad = normal(*y.shape, seed=3, dtype=torch.float64)
    ours = convolution_1d.causal_conv1d_backward(grad, x, weight, bias, silu)
    theirs = torch.autograd.grad(y, leaves, grad)
    assert all(close(a, b, 1e-12) for a, b in zip(ours, theirs, strict=False))
    assert has_bias or ours[2].numel() == 0


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4)], ids=str)
def test_an_empty_convolution_is_empty(shape):
    images, tokens, channels, taps = shape
    x, weight = normal(images, tokens, channels), normal(channels, taps)
    assert convolution_1d.causal_conv1d(x, weight, None, True).shape == x.shape
    grads = convolution_1d.causal_conv1d_backward(x, x, weight, None, True)
    assert grads[0].shape == x.shape and torch.equal(grads[1], torch.zeros_like(weight))


@given(st.integers(0, 16), layouts)
def test_no_token_sees_a_later_one(place, layout):
    x, weight = normal(2, 17, 5), normal(5, 4, seed=1)
    changed = x.clone()
    changed[:, place:] += 1
    before, after = (convolution_1d.causal_conv1d(layout(value), weight, None, True) for value in (x, changed))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])
