"""B images, L tokens, D channels in, N out; E channels and S states of a scan."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import bits, integers, layouts, normal, seeds, sizes
from torch import nn
from torch.export import Dim

from ptq4vm import native, ops, reference

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
        reference.pack_int4(weight) if packed else weight,
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


SHAPES = [(2, 3, 5), (1, 1, 1), (0, 3, 5), (2, 0, 5), (3, 7, 9)]
OPTIONAL = list(itertools.product((True, False), repeat=3))


# --- torch.library's own rules ---


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


# --- integers are the reference's, and so are floats without native kernels ---


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal; with native kernels, which sum in another order, within a few roundings of the largest value."""
    if native.problem() is not None or not theirs.numel():
        return torch.equal(ours, theirs)
    return ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@given(sizes, sizes, sizes, bits, st.booleans(), st.sampled_from(["tensor", "token", "image"]), layouts)
def test_quantizing_is_the_references(images, tokens, channels, count, smooth, qparams, layout):
    inputs = quantize_inputs(images, tokens, channels, smooth=smooth, count=count, qparams=qparams)
    codes = ops.quantize(layout(inputs[0]), *inputs[1:])
    assert codes.is_contiguous()
    assert torch.equal(codes, reference.quantize(*inputs))
    assert torch.equal(ops.dequantize(layout(codes), *inputs[1:3]), reference.dequantize(codes, *inputs[1:3]))


@given(sizes, sizes, st.sampled_from([1, 2, 5, 17]), bits, st.booleans(), layouts)
def test_dynamic_qparams_are_the_references(images, tokens, channels, count, smooth, layout):
    x, _, _, inv_smooth, _ = quantize_inputs(images, tokens, channels, smooth=smooth)
    for ours, theirs in zip(
        ops.choose_qparams(layout(x), inv_smooth, count), reference.choose_qparams(x, inv_smooth, count), strict=True
    ):
        assert ours.is_contiguous() and torch.equal(ours, theirs)


@given(sizes, sizes, sizes, sizes, st.booleans(), st.booleans(), st.sampled_from(["tensor", "token", "image"]), layouts)
def test_the_linear_is_the_references(images, tokens, channels, outputs, bias, packed, qparams, layout):
    inputs = linear_inputs(images, tokens, channels, outputs, bias=bias, packed=packed, qparams=qparams)
    x_q, scale, zero_point, weight, *rest = inputs
    y = ops.linear(layout(x_q), scale, zero_point, layout(weight), *rest)
    assert y.is_contiguous() and y.shape == (images, tokens, outputs)
    assert torch.equal(y, reference.linear(*inputs))


@pytest.mark.parametrize("optional", OPTIONAL, ids=str)
def test_the_scan_is_the_references(optional):
    inputs = scan_inputs(2, 9, 5, 3, optional=optional)
    assert close(ops.selective_scan(*inputs), reference.selective_scan(*inputs))


@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_is_the_references(bias):
    inputs = conv_inputs(2, 9, 5, bias=bias)
    assert close(ops.causal_conv1d(*inputs), reference.causal_conv1d(*inputs))


@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), seeds)
def test_the_linear_is_cast_once(dtype, seed):
    inputs = linear_inputs()
    y = ops.linear(*inputs[:-1], dtype)
    assert y.dtype == dtype
    assert torch.equal(y, reference.linear(*inputs).to(dtype))


# --- gradients ---


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


# --- errors ---


@pytest.mark.parametrize("meta", [False, True])
def test_another_token_count_is_an_error_that_names_both_and_the_way_out(meta):
    device = torch.device("meta" if meta else "cpu")
    message = (
        "token scales were calibrated for 5 tokens, the input has 7; "
        "calibrate at this resolution or use Granularity.PER_TENSOR"
    )
    scale, zero_point = torch.ones(5, device=device), torch.zeros(5, dtype=torch.int32, device=device)
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.quantize(torch.zeros(2, 7, 3, device=device), scale, zero_point, None, 8)
    weight, weight_scale = torch.zeros(4, 3, dtype=torch.int8, device=device), torch.ones(4, device=device)
    with pytest.raises((ValueError, RuntimeError), match=message):
        codes = torch.zeros(2, 7, 3, dtype=torch.int8, device=device)
        ops.linear(codes, scale, zero_point, weight, weight_scale, None, torch.float32)


def test_scales_for_other_images_are_an_error():
    with pytest.raises(
        (ValueError, RuntimeError), match=r"scales of shape .* do not fit an input|scales do not fit the input"
    ):
        ops.quantize(torch.zeros(2, 7, 3), torch.ones(3, 7), torch.zeros(3, 7, dtype=torch.int32), None, 8)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("dtype", "columns", "message"),
    [
        (torch.uint8, 2, "a packed 4-bit weight for 5 channels has 3 columns, this one 2"),
        (torch.uint8, 5, "a packed 4-bit weight for 5 channels has 3 columns, this one 5"),
        (torch.int8, 3, "a int8 weight for 5 channels has 5 columns, this one 3"),
    ],
)
def test_a_weight_of_another_width_is_an_error(dtype, columns, message, meta):
    x_q, scale, zero_point, _, weight_scale, bias, out = linear_inputs()
    weight = torch.zeros(4, columns, dtype=dtype)
    inputs = (x_q, scale, zero_point, weight, weight_scale, bias)
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.linear(*(value.to("meta" if meta else "cpu") for value in inputs), out)


# --- graphs ---


class AllOps(nn.Module):
    """Every op that a model or a quantized graph contains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_inputs = conv_inputs(1, 5, 3)[1:]
        self.scan_inputs = [value for value in scan_inputs(1, 5, 3, 2) if isinstance(value, torch.Tensor)]
        self.quantize_inputs = quantize_inputs(1, 5, 3)[1:]
        self.linear_inputs = linear_inputs(1, 5, 3, 3)[3:]

    def forward(self, x):
        x = ops.causal_conv1d(x, *self.conv_inputs)
        _, delta, A, B, C, D, z, bias = self.scan_inputs
        batch = (x.shape[0], -1, -1)
        x = ops.selective_scan(
            x, delta.expand(batch), A, B.expand(batch), C.expand(batch), D, z.expand(batch), bias, True
        )
        inv_scale, zero_point, inv_smooth, count = self.quantize_inputs
        codes = ops.quantize(x, inv_scale, zero_point, inv_smooth, count)
        y = ops.linear(codes, 1 / inv_scale, zero_point, *self.linear_inputs)
        scale, zero_point = ops.choose_qparams(y, None, 8)
        return ops.dequantize(ops.quantize(y, 1 / scale, zero_point, None, 8), scale, zero_point)


NAMES = ["causal_conv1d", "selective_scan", "quantize", "linear", "choose_qparams", "quantize", "dequantize"]


def test_an_exported_op_is_one_node_and_the_batch_stays_dynamic():
    model = AllOps()
    exported = torch.export.export(
        model, (normal(2, 5, 3),), dynamic_shapes=({0: Dim("batch")},), strict=False
    ).module()
    targets = [str(node.target) for node in exported.graph.nodes]
    assert [target.split(".")[1] for target in targets if target.startswith("ptq4vm.")] == NAMES
    for images in (1, 2, 7):
        x = normal(images, 5, 3, seed=images)
        assert torch.equal(exported(x), model(x))


def test_ops_compile_without_a_graph_break():
    model = AllOps()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for images in (2, 7):
        x = normal(images, 5, 3, seed=images)
        assert torch.equal(compiled(x), model(x))


def test_learning_through_a_compiled_scan_and_convolution():
    def loss(x, weight, bias, *scan):
        return ops.selective_scan(ops.causal_conv1d(x, weight, bias, True), *scan, True).square().sum()

    _, *scan, _ = scan_inputs(2, 5, 3, 2)
    x, weight, bias, _ = conv_inputs(2, 5, 3)
    inputs = with_gradient((x, weight, bias, *scan))
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    theirs = torch.autograd.grad(loss(*inputs), inputs)
    ours = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
