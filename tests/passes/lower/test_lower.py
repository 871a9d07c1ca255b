"""Integers of the lowered graph against those of the Q/DQ graph, linear by linear.

Teacher forced: the Q/DQ graph runs, and each linear of the lowered graph is given the floating-point input that the
same linear had there. So a difference in one linear cannot hide, or cause, one in the next.
B images, L tokens, D channels in, N out.
"""

import math

import pytest
import torch
from helpers.lowering import check, constant, in_order
from helpers.public_models import slow_but
from helpers.strategies import EVERYTHING, fitting, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ptq4vm import Granularity, QuantConfig, calibrate, convert, ops, prepare
from ptq4vm.graph.verify import is_lowered
from ptq4vm.passes.lower.lower import lower

aten = torch.ops.aten


CONFIGS = {
    **{f"w{count}a{count}": QuantConfig(weights={"bits": count}, activations={"bits": count}) for count in range(2, 9)},
    "w4a8": QuantConfig(weights={"bits": 4}, activations={"bits": 8}),
    "w8a4": QuantConfig(weights={"bits": 8}, activations={"bits": 4}),
    "w4a4 unsmoothed": QuantConfig(weights={"bits": 4}, activations={"bits": 4}, smoothing=None),
    "w8a8 unsmoothed": QuantConfig(smoothing=None),
    "per tensor": QuantConfig.smoothquant(8),
    "per tensor w4a4 unsmoothed": QuantConfig.minmax(4),
    "dynamic": QuantConfig(activations={"granularity": Granularity.PER_TOKEN_DYNAMIC}, range_search=False),
    "dynamic w4a4 unsmoothed": QuantConfig.minmax(4, activations={"granularity": Granularity.PER_TOKEN_DYNAMIC}),
    "everything": EVERYTHING,
}


OFTEN = ("w4a4", "w8a8", "w4a8", "w4a4 unsmoothed", "per tensor", "dynamic", "everything")


@pytest.mark.parametrize("name", slow_but(OFTEN, CONFIGS))
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
        weights={"bits": weight_bits},
        **{"smoothing": 0.5 if smooth else None} | fitting(granularity, bits=activation_bits),
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
        packed = CONFIGS[name].weights.bits <= 4
        assert weight.dtype == (torch.uint8 if packed else torch.int8)
        assert weight.shape[0] == channels


def test_every_linear_is_lowered_and_nothing_else_is_left_of_the_exchange_form(roads):
    lowered = convert(roads.calibrated(CONFIGS["w4a4"]))
    assert is_lowered(lowered) and not is_lowered(convert(roads.calibrated(CONFIGS["w4a4"]), lower=False))
    left = [node.target for node in lowered.graph.nodes if "quantized_decomposed" in str(node.target)]
    assert not left
    (head,) = in_order(lowered, aten.linear.default)
    assert head.args[1].target == "head.weight"
    floats = [
        name for name, value in lowered.state_dict().items() if ".mixer." in name and name.endswith("proj.weight")
    ]
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
