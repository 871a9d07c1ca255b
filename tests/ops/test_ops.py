"""B images, L tokens, D channels in, N out; E channels and S states of a scan."""

import itertools

import pytest
import torch
from helpers.operator_inputs import conv_inputs, library, linear_inputs, quantize_inputs, scan_inputs, with_gradient
from helpers.strategies import bits, integers, layouts, normal, seeds, sizes
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.backend import native
from ptq4vm.ops import convolution_1d, linears, quantization, scans

SHAPES = [(2, 3, 5), (1, 1, 1), (0, 3, 5), (2, 0, 5), (3, 7, 9)]

OPTIONAL = list(itertools.product((True, False), repeat=3))


@pytest.mark.parametrize("qparams", ["tensor", "token", "image"])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizing_obeys_the_rules(shape, smooth, qparams):
    inputs = quantize_inputs(*shape, smooth=smooth, qparams=qparams)
    torch.library.opcheck(library.quantize.default, inputs)
    torch.library.opcheck(library.choose_qparams.default, (inputs[0], inputs[3], 4))
    codes = integers(-8, 7, *shape)
    torch.library.opcheck(library.dequantize.default, (codes, *inputs[1:3]))
    torch.library.opcheck(library.rotate.default, with_gradient(inputs[:1]))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_linear_obeys_the_rules(shape, bias, packed):
    torch.library.opcheck(library.linear.default, linear_inputs(*shape, bias=bias, packed=packed))


@pytest.mark.parametrize("optional", OPTIONAL, ids=str)
def test_the_scan_obeys_the_rules(optional):
    inputs = scan_inputs(optional=optional)
    torch.library.opcheck(library.selective_scan.default, with_gradient(inputs))
    torch.library.opcheck(library.selective_scan_backward.default, (normal(2, 3, 4), *inputs))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (0, 3, 4, 2), (2, 0, 4, 2), (3, 7, 5, 3)], ids=str)
def test_the_scan_obeys_the_rules_at_odd_sizes(shape):
    inputs = scan_inputs(*shape)
    torch.library.opcheck(library.selective_scan.default, with_gradient(inputs))
    torch.library.opcheck(library.selective_scan_backward.default, (normal(*shape[:3]), *inputs))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 1, 1), (0, 5, 3, 4), (2, 0, 3, 4), (2, 2, 3, 4)], ids=str)
def test_the_convolution_obeys_the_rules(shape, bias, silu):
    inputs = conv_inputs(*shape, bias=bias, silu=silu)
    torch.library.opcheck(library.causal_conv1d.default, with_gradient(inputs))
    torch.library.opcheck(library.causal_conv1d_backward.default, (normal(*shape[:3], seed=5), *inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_obey_them_too(dtype):
    torch.library.opcheck(library.quantize.default, quantize_inputs(dtype=dtype))
    torch.library.opcheck(library.rotate.default, (normal(2, 3, 12).to(dtype),))
    torch.library.opcheck(library.linear.default, (*linear_inputs()[:-1], dtype))
    torch.library.opcheck(library.selective_scan.default, with_gradient(scan_inputs(dtype=dtype)))
    torch.library.opcheck(library.causal_conv1d.default, with_gradient(conv_inputs(dtype=dtype)))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal; with native kernels, which sum in another order, within a few roundings of the largest value."""
    if native.unavailable_reason() is not None or not theirs.numel():
        return torch.equal(ours, theirs)
    return ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@given(sizes, sizes, sizes, bits, st.booleans(), st.sampled_from(["tensor", "token", "image"]), layouts)
def test_quantizing_is_the_references(images, tokens, channels, count, smooth, qparams, layout):
    inputs = quantize_inputs(images, tokens, channels, smooth=smooth, count=count, qparams=qparams)
    codes = ops.quantize(layout(inputs[0]), *inputs[1:])
    assert codes.is_contiguous()
    assert torch.equal(codes, quantization.quantize(*inputs))
    assert torch.equal(ops.dequantize(layout(codes), *inputs[1:3]), quantization.dequantize(codes, *inputs[1:3]))


@given(sizes, sizes, st.sampled_from([1, 2, 5, 17]), bits, st.booleans(), layouts)
def test_dynamic_qparams_are_the_references(images, tokens, channels, count, smooth, layout):
    x, _, _, inv_smooth, _ = quantize_inputs(images, tokens, channels, smooth=smooth)
    for ours, theirs in zip(
        ops.choose_qparams(layout(x), inv_smooth, count), quantization.choose_qparams(x, inv_smooth, count), strict=True
    ):
        assert ours.is_contiguous() and torch.equal(ours, theirs)


@given(sizes, sizes, sizes, sizes, st.booleans(), st.booleans(), st.sampled_from(["tensor", "token", "image"]), layouts)
def test_the_linear_is_the_references(images, tokens, channels, outputs, bias, packed, qparams, layout):
    inputs = linear_inputs(images, tokens, channels, outputs, bias=bias, packed=packed, qparams=qparams)
    x_q, scale, zero_point, weight, *rest = inputs
    y = ops.linear(layout(x_q), scale, zero_point, layout(weight), *rest)
    assert y.is_contiguous() and y.shape == (images, tokens, outputs)
    assert torch.equal(y, linears.linear(*inputs))


@pytest.mark.parametrize("optional", OPTIONAL, ids=str)
def test_the_scan_is_the_references(optional):
    inputs = scan_inputs(2, 9, 5, 3, optional=optional)
    assert close(ops.selective_scan(*inputs), scans.selective_scan(*inputs))


@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_is_the_references(bias):
    inputs = conv_inputs(2, 9, 5, bias=bias)
    assert close(ops.causal_conv1d(*inputs), convolution_1d.causal_conv1d(*inputs))


@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), seeds)
def test_the_linear_is_cast_once(dtype, seed):
    inputs = linear_inputs()
    y = ops.linear(*inputs[:-1], dtype)
    assert y.dtype == dtype
    assert torch.equal(y, linears.linear(*inputs).to(dtype))


@pytest.mark.parametrize("optional", OPTIONAL, ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_every_input_of_the_scan_has_its_gradient(optional, softplus):
    *inputs, _ = with_gradient(scan_inputs(optional=optional, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *values: ops.selective_scan(*values, softplus), inputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_every_input_of_the_convolution_has_its_gradient(bias, silu):
    *inputs, _ = with_gradient(conv_inputs(bias=bias, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *values: ops.causal_conv1d(*values, silu), inputs)
