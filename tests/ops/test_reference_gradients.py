"""fake_quantize and its gradient where there are no kernels: equal to autograd on exact numbers.

x (B, L, D) is in quarters, scales and smoothing are powers of two, and gradients integers: every sum is exact.
"""

import pytest
import torch
from helpers.strategies import bits, integers, powers_of_two, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq4vm.ops import fake_quantization

KINDS = st.sampled_from(["weight", "tensor", "token", "image"])
SCALES = {"weight": (3,), "tensor": (1,), "token": (3,), "image": (2, 3)}


def inputs(kind: str, count: int, smooth: bool, seed: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """Half of the values are clamped at few bits, and many lie on a tie or on the last code."""
    shape = (3, 5) if kind == "weight" else (2, 3, 5)
    x = integers(-120, 120, *shape, seed=seed).float() / 4
    scale = powers_of_two(*SCALES[kind], seed=seed, low=-1, high=2)
    half = 2 ** (count - 1)
    zero_point = None if kind == "weight" else integers(-half, half - 1, *SCALES[kind], seed=seed + 1).float()
    return x, scale, zero_point, powers_of_two(5, seed=seed, low=-1, high=1) if smooth else None, count


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor | None, smooth: Tensor | None, count: int) -> Tensor:
    """The meaning: rounding has slope one, values outside the codes' range are constants of the qparams."""
    half, low = 2 ** (count - 1), -(2 ** (count - 1)) + (zero_point is None)
    scale, zero = scale.unsqueeze(-1), torch.zeros(1) if zero_point is None else zero_point.unsqueeze(-1)
    v = (x if smooth is None else x * smooth) / scale
    code = v + (v.round() - v).detach()
    code = torch.where(v.round() < low - zero, low - zero, code)
    return torch.where(v.round() > half - 1 - zero, half - 1 - zero, code) * scale


@given(KINDS, bits, st.booleans(), seeds)
def test_values_and_gradients_are_those_of_the_definition(kind, count, smooth, seed):
    x, scale, zero_point, factor, _ = inputs(kind, count, smooth, seed)
    leaves = [value.requires_grad_() for value in (x, scale, zero_point, factor) if value is not None]
    grad = integers(-3, 3, *x.shape, seed=seed + 2).float()
    want = straight_through(x, scale, zero_point, factor, count)
    with torch.no_grad():
        assert torch.equal(fake_quantization.fake_quantize(x, scale, zero_point, factor, count), want)
        needs = (True, True, zero_point is not None, smooth)
        every = fake_quantization.fake_quantize_backward(grad, x, scale, zero_point, factor, count, *needs)
    have = [value for value, needed in zip(every, needs, strict=True) if needed]
    assert all(map(torch.equal, have, torch.autograd.grad(want, leaves, grad)))


@given(KINDS, st.booleans(), st.tuples(*[st.booleans()] * 4), seeds)
def test_what_nobody_needs_is_empty_and_changes_nothing_else(kind, smooth, needs, seed):
    arguments = inputs(kind, 4, smooth, seed)
    possible = (True, True, kind != "weight", smooth)
    needs = tuple(a and b for a, b in zip(needs, possible, strict=True))
    grad = integers(-3, 3, *arguments[0].shape, seed=seed + 2).float()
    every = fake_quantization.fake_quantize_backward(grad, *arguments, *possible)
    some = fake_quantization.fake_quantize_backward(grad, *arguments, *needs)
    for one, all_of_it, needed in zip(some, every, needs, strict=True):
        assert torch.equal(one, all_of_it) if needed else one.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_have_the_types_of_what_they_belong_to(dtype):
    """Computed in float32; a product with the smoothing is rounded once."""
    x, scale, zero_point, smooth, count = inputs("token", 4, True, 0)
    grad = integers(-3, 3, *x.shape, seed=2).float()
    wide = fake_quantization.fake_quantize_backward(grad, x, scale, zero_point, smooth, count, True, True, True, True)
    for kinds in ([dtype] * 3, [dtype, torch.float32, torch.float32], [torch.float32, dtype, dtype]):
        narrow = (value.to(kind) for value, kind in zip((x, scale, smooth), kinds, strict=True))
        a, b, c = narrow
        have = fake_quantization.fake_quantize_backward(grad, a, b, zero_point, c, count, True, True, True, True)
        want = [value.to(kind) for value, kind in zip(wide, [*kinds[:2], torch.float32, kinds[2]], strict=True)]
        assert all(one.dtype is other.dtype and torch.equal(one, other) for one, other in zip(have, want, strict=True))
        assert fake_quantization.fake_quantize(a, b, zero_point, c, count).dtype is kinds[0]
