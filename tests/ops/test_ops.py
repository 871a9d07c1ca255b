"""B images, L tokens, D channels in, N out; E channels and S states of a scan."""

import itertools

import pytest
import torch
from helpers.strategies import bits, integers, layouts, normal, seeds, sizes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

from ptq4vm import ops
from ptq4vm.backend import native
from ptq4vm.ops import convolution_1d, fake_quantization, linears, quantization, scans
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


# --- operators without gradients ---


def without_gradient():
    """A call of each kind: codes and numbers, with and without tokens."""
    x, inv_scale, zero_point, inv_smooth, count = quantize_inputs(1, 3, 4)
    codes = integers(-8, 7, 1, 3, 4)
    weight = (torch.ones(5, 4, dtype=torch.int8), torch.ones(5), None, torch.float32)
    norm = (x, x, None, None, 1e-5, True, False, inv_scale, zero_point, inv_smooth, count)
    return {
        "quantize": (x, inv_scale, zero_point, inv_smooth, count),
        "choose_qparams": (x, None, 8),
        "dequantize": (codes, inv_scale, zero_point),
        "linear": (codes, inv_scale, zero_point, *weight),
        "norm_quantize": norm,
        "selective_scan_backward": (normal(1, 3, 4), *scan_inputs(1, 3, 4, 2)),
    }


@pytest.mark.parametrize("implementation", ["operator", "reference"])
@pytest.mark.parametrize("name", without_gradient())
def test_no_gradient_is_left_out_in_silence(name, implementation):
    """For every tensor that could require one. Without gradients the same call is made."""
    call = getattr(library, name) if implementation == "operator" else ops.REFERENCES[name]
    arguments = without_gradient()[name]
    names = [argument.name for argument in getattr(library, name).default._schema.arguments]
    for at, value in enumerate(arguments):
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        inputs = [*arguments[:at], value.clone().requires_grad_(), *arguments[at + 1 :]]
        with pytest.raises(
            RuntimeError, match=rf"ptq4vm::{name}: .* no gradient, and {names[at]} requires one: .*no_grad"
        ):
            call(*inputs)
        middle = [*arguments[:at], value.clone().requires_grad_() * 1, *arguments[at + 1 :]]
        with pytest.raises(RuntimeError, match="no gradient"):
            call(*middle)
        with torch.no_grad():
            call(*inputs)


def test_a_compiled_quantization_leaves_out_no_gradient():
    inputs = quantize_inputs()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + ops.quantize(x, *inputs[1:]), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"ptq4vm::quantize: the operator has no gradient, and x requires one"):
        compiled(inputs[0].clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(compiled(inputs[0]), inputs[0] + ops.quantize(*inputs))


# --- values of arguments ---


@pytest.mark.parametrize("implementation", ["operator", "reference"])
@given(st.integers(1, 9), st.integers(0, 2), seeds)
def test_every_token_of_an_order_comes_once(implementation, tokens, kind, seed):
    """Permutations of any integer type; what is none is refused, and names the token."""
    random = torch.Generator().manual_seed(seed)
    call = library.conv1d_quantize if implementation == "operator" else ops.REFERENCES["conv1d_quantize"]
    order = torch.randperm(tokens, generator=random).view(1, -1)
    rest = (torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), None, 8)
    arguments = (normal(2, tokens, 3, seed=seed), normal(1, 3, 2), None)
    first = call(*arguments, order.int(), *rest)
    assert all(map(torch.equal, first, call(*arguments, order, *rest)))
    at = int(torch.randint(tokens, (), generator=random))
    wrong = order.clone()
    wrong[0, at] = [-1, tokens, 2**32 + int(order[0, at])][kind]
    with pytest.raises((ValueError, RuntimeError), match=r"ptq4vm::conv1d_quantize: .*order"):
        call(*arguments, wrong, *rest)
    if tokens > 1:
        twice = order.clone()
        twice[0, at] = order[0, at - 1]
        with pytest.raises((ValueError, RuntimeError), match=f"names token {int(order[0, at - 1])} twice"):
            call(*arguments, twice, *rest)


@pytest.mark.parametrize("implementation", ["operator", "reference"])
@pytest.mark.parametrize("value", [128, -129, 2**31, 2**32, -(2**63), 2**63 - 1])
def test_zero_points_are_codes_whatever_their_type(implementation, value):
    call = library.quantize if implementation == "operator" else ops.REFERENCES["quantize"]
    x, one = normal(1, 2, 3), torch.ones(1)
    with pytest.raises((ValueError, RuntimeError), match=f"ptq4vm::quantize: zero_point.* {value}(,|$)"):
        call(x, one, torch.tensor([value]), None, 8)
    assert torch.equal(call(x, one, torch.tensor([-128]), None, 8), call(x, one, torch.tensor([-128]).int(), None, 8))


def test_a_zero_point_that_learns_is_not_cut_to_an_integer():
    x, zero = normal(1, 2, 3) * 9, torch.tensor([1.5])
    ours = library.fake_quantize(x, torch.ones(1), zero, None, 4)
    assert ours.max() == 5.5 and torch.equal(ours, fake_quantization.fake_quantize(x, torch.ones(1), zero, None, 4))


@pytest.mark.parametrize("implementation", ["operator", "reference"])
def test_a_token_of_nan_spoils_no_other(implementation):
    """Dynamic qparams: its results are NaN, and those of all others what they were."""
    call = library if implementation == "operator" else None
    run = (lambda name: getattr(call, name)) if call else ops.REFERENCES.__getitem__
    x = normal(2, 3, 8)
    weight = (torch.randint(-7, 8, (5, 8), dtype=torch.int8), torch.ones(5), None, torch.float32)

    def linear(x):
        scale, zero_point = run("choose_qparams")(x, None, 8)
        return run("linear")(run("quantize")(x, 1 / scale, zero_point, None, 8), scale, zero_point, *weight)

    want, broken = linear(x), x.clone()
    broken[1, 2, 5] = torch.nan
    y = linear(broken)
    assert y[1, 2].isnan().all()
    y[1, 2] = want[1, 2]
    assert torch.equal(y, want)


@pytest.mark.parametrize("implementation", ["operator", "reference"])
def test_nothing_in_very_many_places_takes_no_time(implementation):
    many, zero = 2**40, torch.zeros(1, dtype=torch.int32)
    run = (lambda name: getattr(library, name)) if implementation == "operator" else ops.REFERENCES.__getitem__
    u, states, A = torch.empty(many, 0, 8), torch.empty(many, 0, 2), torch.ones(8, 2)
    scan = (u, u, A, states, states, None, None, None, True)
    one = torch.ones(1)
    assert run("selective_scan")(*scan).shape == u.shape
    assert run("selective_scan_quantized")(*scan, one, one, 8).shape == u.shape
    assert not run("selective_scan_backward")(u, *scan)[2].any()
    assert run("causal_conv1d")(u, torch.ones(8, 4), None, True).shape == u.shape
    assert not run("causal_conv1d_backward")(u, u, torch.ones(8, 4), None, True)[1].any()
    assert run("quantize")(u, one, zero, None, 8).shape == u.shape
    time = torch.empty(0, many, 8)
    states = torch.empty(0, many, 2)
    assert (
        run("selective_scan_quantized")(time, time, A, states, states, None, None, None, True, one, one, 8).numel() == 0
    )
    x = torch.empty(0, 0, 8)
    assert (
        run("conv2d_quantize")(x, torch.ones(8, 1, 1), None, 0, many, one.view(1, 1), zero.view(1, 1), None, 8)[
            1
        ].numel()
        == 0
    )


@pytest.mark.parametrize("implementation", ["operator", "reference"])
@pytest.mark.parametrize(("height", "width"), [(2**62, 4), (2**32, 2**32), (-1, -6), (2**63 - 1, 2), (6, 2)])
def test_a_map_has_its_tokens_in_any_arithmetic(implementation, height, width):
    call = library.conv2d_quantize if implementation == "operator" else ops.REFERENCES["conv2d_quantize"]
    zero = torch.zeros(1, 1, dtype=torch.int32)
    for tokens in (0, 6):
        with pytest.raises((ValueError, RuntimeError), match=r"ptq4vm::conv2d_quantize: .*height"):
            call(normal(1, tokens, 3), normal(3, 1, 1), None, height, width, torch.ones(1, 1), zero, None, 8)
