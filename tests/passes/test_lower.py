"""Integers of the lowered graph against those of the Q/DQ graph, linear by linear.

Teacher forced: the Q/DQ graph runs, and each linear of the lowered graph is given the floating-point input that the
same linear had there. So a difference in one linear cannot hide, or cause, one in the next.
B images, L tokens, D channels in, N out.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal
from torch import fx, nn

from ptq4vm import Granularity, QuantConfig, calibrate, convert, ops, prepare, reference
from ptq4vm.fake_quantize import quantized_decomposed as qd
from ptq4vm.graph import attribute
from ptq4vm.passes.lower import is_lowered, lower

aten = torch.ops.aten


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule, *inputs: torch.Tensor) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, object] = {}
        self.run(*inputs)

    def run_node(self, node: fx.Node) -> object:
        self.values[node] = super().run_node(node)
        return self.values[node]


def in_order(gm: fx.GraphModule, target) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is target]


def quantized_linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Linears of the Q/DQ graph with a dequantized weight."""
    weight = qd.dequantize_per_channel.default
    return [node for node in in_order(gm, aten.linear.default) if node.args[1].target is weight]


def parts(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The codes of a Q/DQ linear's input, and what they were made from, before any smoothing."""
    codes = node.args[0].args[0]
    source = codes.args[0]
    factor = source.args[1] if source.target is aten.mul.Tensor else None
    smoothed = isinstance(factor, fx.Node) and str(factor.target).endswith(".inv_smooth")
    return codes, source.args[0] if smoothed else source


def qparams(node: fx.Node, recorder: Recorder) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a Q/DQ linear's input."""
    scale, zero_point = node.args[0].args[1:3]
    if isinstance(scale, fx.Node):
        return recorder.values[scale], recorder.values[zero_point]
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def constant(gm: fx.GraphModule, node: fx.Node | None):
    return None if node is None else attribute(gm, node.target)


def forced(gm: fx.GraphModule, node: fx.Node, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, output and zero point of one lowered linear on x."""
    quantize = node.args[0]
    _, inv_scale, zero_point, inv_smooth, count = quantize.args
    inv_smooth = constant(gm, inv_smooth)
    if inv_scale.op == "get_attr":
        inv_scale, zero_point, scale = (constant(gm, arg) for arg in (inv_scale, zero_point, node.args[1]))
    else:
        scale, zero_point = ops.choose_qparams(x, inv_smooth, count)
        inv_scale = scale.reciprocal()
    codes = ops.quantize(x, inv_scale, zero_point, inv_smooth, count)
    _, _, _, weight, weight_scale, bias, dtype = node.args
    rest = (constant(gm, weight), constant(gm, weight_scale), constant(gm, bias), dtype)
    return codes, ops.linear(codes, scale, zero_point, *rest), zero_point


def check(prepared: fx.GraphModule, x: torch.Tensor) -> int:
    """Holds every linear of the lowered graph to those of the Q/DQ graph; how many there were."""
    exchange, lowered = convert(prepared, lower=False), convert(prepared)
    recorder = Recorder(exchange, x)
    pairs = list(zip(quantized_linears(exchange), in_order(lowered, ops.linear.default), strict=True))
    for theirs, ours in pairs:
        code_node, source = parts(theirs)
        their_codes = recorder.values[code_node]
        codes, y, zero_point = forced(lowered, ours, recorder.values[source])
        assert codes.dtype == torch.int8 and torch.equal(codes, their_codes)

        scale, their_zero_point = qparams(theirs, recorder)
        weight_q, weight_scale = (recorder.values[theirs.args[1].args[i]] for i in (0, 1))
        acc = (their_codes.long() - their_zero_point.long().unsqueeze(-1)) @ weight_q.long().t()
        weight = constant(lowered, ours.args[3])
        integers = reference.unpack_int4(weight, codes.shape[-1]) if weight.dtype == torch.uint8 else weight
        assert torch.equal(integers, weight_q)
        assert torch.equal(reference.accumulate(codes, zero_point, integers).long(), acc)

        bias = recorder.values[theirs.args[2]] if len(theirs.args) > 2 else None
        want = acc.double() * scale.double().unsqueeze(-1) * weight_scale.double()
        product = want.abs()
        if bias is not None:
            want = want + bias.double()
        # one rounding of the accumulator, one a multiplication, one of the sum: half a unit each, of the largest term
        unit = torch.finfo(torch.float32).eps * torch.maximum(product, want.abs())
        assert ((y.double() - want).abs() <= (2 if bias is not None else 1.5) * unit).all()
    return len(pairs)


CONFIGS = {
    **{f"w{count}a{count}": QuantConfig(weight_bits=count, activation_bits=count) for count in range(2, 9)},
    "w4a8": QuantConfig(weight_bits=4, activation_bits=8),
    "w8a4": QuantConfig(weight_bits=8, activation_bits=4),
    "w4a4 unsmoothed": QuantConfig(weight_bits=4, activation_bits=4, smoothing=None),
    "w8a8 unsmoothed": QuantConfig(smoothing=None),
    "per tensor": QuantConfig.smoothquant(8),
    "per tensor w4a4 unsmoothed": QuantConfig.minmax(4),
    "dynamic": QuantConfig(granularity=Granularity.PER_TOKEN_DYNAMIC, range_search=False),
    "dynamic w4a4 unsmoothed": QuantConfig.minmax(4, granularity=Granularity.PER_TOKEN_DYNAMIC),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_accumulators_of_a_vim_are_those_of_the_exchange_form(roads, name):
    prepared = roads.calibrated(CONFIGS[name])
    for count in (1, 3):
        assert check(prepared, roads.images[:count]) == 12


class Linears(nn.Module):
    """Two linears that share their input, with and without a bias, and one after them."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(channels, outputs), nn.Linear(channels, outputs, bias=False)
        self.last = nn.Linear(outputs, 3)

    def forward(self, x):
        return self.last(torch.nn.functional.silu(self.first(x)) * self.second(x))


@settings(max_examples=12)
@given(
    images=st.integers(1, 3),
    tokens=st.integers(1, 7),
    channels=st.sampled_from([1, 2, 3, 7, 16, 33]),
    outputs=st.sampled_from([1, 2, 5]),
    weight_bits=st.integers(2, 8),
    activation_bits=st.integers(2, 8),
    granularity=st.sampled_from(Granularity),
    smooth=st.booleans(),
    seed=st.integers(0, 99),
)
def test_they_are_for_any_shape_and_bits(
    images, tokens, channels, outputs, weight_bits, activation_bits, granularity, smooth, seed
):
    config = QuantConfig(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        granularity=granularity,
        smoothing=0.5 if smooth else None,
        range_search=granularity is not Granularity.PER_TOKEN_DYNAMIC,
    )
    torch.manual_seed(seed)
    x = normal(images, tokens, channels, seed=seed)
    prepared = calibrate(prepare(Linears(channels, outputs), (x,), config), [x], progress=False)
    assert check(prepared, 1.5 * x) == 3


@pytest.mark.parametrize("name", ["w8a8", "w4a4", "per tensor", "dynamic"])
def test_an_empty_batch_is_lowered_too(roads, name):
    assert check(roads.calibrated(CONFIGS[name]), roads.images[:0]) == 12


@pytest.mark.parametrize("name", ["w8a8", "w6a6", "w4a4", "w2a2", "w4a8", "w8a4"])
def test_weights_of_up_to_four_bits_are_packed(roads, name):
    lowered = convert(roads.calibrated(CONFIGS[name]))
    for node in in_order(lowered, ops.linear.default):
        weight, channels = constant(lowered, node.args[3]), node.meta["val"].shape[-1]
        packed = CONFIGS[name].weight_bits <= 4
        assert weight.dtype == (torch.uint8 if packed else torch.int8)
        assert weight.shape[0] == channels


def test_every_linear_is_lowered_and_nothing_else_is_left_of_the_exchange_form(roads):
    lowered = convert(roads.calibrated(CONFIGS["w4a4"]))
    assert is_lowered(lowered) and not is_lowered(convert(roads.calibrated(CONFIGS["w4a4"]), lower=False))
    left = [node.target for node in lowered.graph.nodes if "quantized_decomposed" in str(node.target)]
    assert not left
    (head,) = [node for node in in_order(lowered, aten.linear.default)]
    assert head.args[1].target == "head.weight"
    floats = [name for name, value in lowered.state_dict().items() if ".mixer." in name and name.endswith("proj.weight")]
    assert not floats  # the weights in floating point are gone


def test_smoothing_is_inside_the_quantize(roads):
    lowered = convert(roads.calibrated(CONFIGS["w4a4"]))
    assert all(node.args[3] is not None for node in in_order(lowered, ops.quantize.default))
    plain = convert(roads.calibrated(CONFIGS["w4a4 unsmoothed"]))
    assert all(node.args[3] is None for node in in_order(plain, ops.quantize.default))


def test_lowering_twice_is_lowering_once(roads):
    lowered = convert(roads.calibrated(CONFIGS["w4a4"]))
    code = lowered.code
    lower(lowered).recompile()
    assert lowered.code == code


def test_no_kernel_divides(roads):
    """The reciprocals are stored; only dynamic scales have theirs taken at run time."""
    lowered = convert(roads.calibrated(CONFIGS["w4a4"]))
    assert not in_order(lowered, aten.reciprocal.default)
    for node in in_order(lowered, ops.linear.default):
        scale, inverse = constant(lowered, node.args[1]), constant(lowered, node.args[0].args[1])
        assert torch.equal(inverse, 1 / scale)


@pytest.mark.parametrize("name", ["w8a8", "w4a4", "dynamic"])
def test_the_logits_agree(roads, name):
    """Codes behind the first linear may differ by rounding; that moves logits by little beside what quantizing did."""
    prepared = roads.calibrated(CONFIGS[name])
    a, b = convert(prepared, lower=False)(roads.images), convert(prepared)(roads.images)
    assert (a - b).square().mean() < 1e-3 * (a - roads.model(roads.images)).square().mean() + 1e-9


def test_a_lowered_model_compiles_and_exports(roads, images):
    lowered = convert(roads.calibrated(CONFIGS["w4a4"]))
    want = lowered(images)
    torch.compiler.reset()
    assert torch.equal(torch.compile(lowered, backend="eager", fullgraph=True)(images), want)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(lowered, (images,), dynamic_shapes=shapes, strict=False).module()
    assert len(in_order(exported, ops.linear.default)) == 12
    assert torch.equal(exported(images[:3]), lowered(images[:3]))
    assert math.isfinite(want.sum())
