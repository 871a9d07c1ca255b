import pytest
import torch
from helpers.public_models import NANO, SHORT, create, slow_but
from helpers.strategies import normal
from torch import nn

from benchmarks.speed.layers import CATEGORIES, Category, category, is_known, profile, totals
from ptq4vm import convert, fuse, ops
from ptq4vm.config import QuantConfig
from ptq4vm.graph.capture import capture
from ptq4vm.quantization_specs import Granularity
from ptq4vm.serialization.empty_model import empty_quantized_model

IMAGES = normal(2, 3, 32, 32, seed=0)


def calls(gm):
    return [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


@pytest.mark.parametrize("name", slow_but(("vim_nano_patch4_32",), NANO))
def test_no_operator_of_a_family_is_of_unknown_category(name):
    granularity = Granularity.PER_TOKEN_DYNAMIC if name == NANO[0] else Granularity.PER_TOKEN
    config = QuantConfig(activations={"granularity": granularity}, range_search=False)
    graphs = [
        capture(create(name).eval(), (IMAGES,)),
        empty_quantized_model(create(name, **SHORT[name]).eval(), (IMAGES,), config),
    ]
    graphs += [fuse(graphs[1])]
    for gm in graphs:
        assert [str(node.target) for node in calls(gm) if not is_known(node)] == []
        found = {category(node) for node in calls(gm)}
        quantized = [set(), {Category.QUANTIZE}, found & {Category.QUANTIZE}][graphs.index(gm)]
        assert found == set(Category) - {Category.QUANTIZE} | quantized


def test_each_of_our_operators_has_a_category_that_is_not_other():
    names = [schema.split("(")[0] for schema in ops.SCHEMAS]
    backward = {name for name in names if name.endswith("_backward")}
    assert {name: CATEGORIES.get(name, Category.OTHER) for name in names if name not in backward} == {
        "quantize": Category.QUANTIZE,
        "choose_qparams": Category.QUANTIZE,
        "dequantize": Category.QUANTIZE,
        "rotate": Category.QUANTIZE,
        "rotate_quantize": Category.QUANTIZE,
        "gate_quantize": Category.QUANTIZE,
        "fake_quantize": Category.QUANTIZE,
        "linear": Category.LINEAR,
        "linear_packed": Category.LINEAR,
        "linear_gelu_quantize": Category.LINEAR,
        "selective_scan": Category.SCAN,
        "selective_scan_quantized": Category.SCAN,
        "directional_scan": Category.SCAN,
        "directional_scan_quantize": Category.SCAN,
        "causal_conv1d": Category.CONV,
        "conv1d_quantize": Category.CONV,
        "conv2d_quantize": Category.CONV,
        "norm_quantize": Category.NORM,
    }


def test_an_operator_nobody_knows_is_other_and_said_to_be_unknown():
    class Model(nn.Module):
        def forward(self, x):
            return torch.special.erfcx(x)

    *_, node = calls(capture(Model(), (torch.zeros(2, 3),)))
    assert not is_known(node) and category(node) is Category.OTHER


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 8, bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)).flip(1))


def test_every_operator_is_timed_under_its_weights_name():
    gm = capture(Small(), (torch.zeros(2, 5, 16),))
    ticks = []
    found = profile({"a": gm, "b": gm}, torch.zeros(3, 5, 16), warmup=1, repeats=3, tick=lambda: ticks.append(1))
    assert len(ticks) == 8 and list(found) == ["a", "b"]
    layers = found["a"]
    assert [layer.node for layer in layers] == [node.name for node in calls(gm)]
    assert [layer.name for layer in layers if layer.category is Category.LINEAR] == ["first", "second"]
    assert sum(layer.share for layer in layers) == pytest.approx(1)
    assert sum(totals(layers).values()) == pytest.approx(sum(layer.seconds for layer in layers))
    for layer in layers:
        products = {"first": 16 * 32, "second": 32 * 8}.get(layer.name)
        if layer.gops is None:
            assert products is None or layer.category is not Category.LINEAR
        else:
            assert layer.gops * layer.seconds == pytest.approx(2e-9 * 3 * 5 * products)


def test_integer_linears_carry_their_names(roads, images):
    lowered = convert(roads.calibrated(QuantConfig(range_search=False)))
    found = profile({"quantized": lowered, "fused": fuse(lowered)}, images[:2], warmup=0, repeats=1)
    for layers in found.values():
        linears = [layer for layer in layers if layer.category is Category.LINEAR]
        assert {"layers.0.mixer.in_proj", "layers.1.mixer.out_proj"} <= {layer.name for layer in linears}
        assert all(layer.gops for layer in linears)
