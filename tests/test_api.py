"""None"""

import itertools

import pytest
import torch
from helpers.api import CONFIGS
from helpers.small_models import BEST, LEARNED, blocks
from helpers.strategies import bits, normal
from hypothesis import given, settings
from torch import nn
from torch.fx import GraphModule

import ptq4vm
from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.metadata import metadata_of


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_until_it_is_calibrated_the_model_computes_what_it_did(roads, small_vim, config):
    """Bit for bit, but for a rotation, which x and W undo in float32."""
    prepared = roads.prepared(config)
    for count in (1, 2, 5):
        found, want = prepared(roads.images[:count]), small_vim(roads.images[:count])
        assert torch.allclose(found, want, rtol=0, atol=1e-4) if config.rotation else torch.equal(found, want)


def test_preparing_leaves_the_callers_model_alone(images):
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(prepare(model, (normal(2, 5, 6),), CONFIGS["w4a4"]), [normal(4, 5, 6)], progress=False)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_the_converted_graph_is_the_calibrated_one(roads, config):
    calibrated = roads.calibrated(config)
    converted = convert(calibrated, lower=False)
    for count in (1, 2, 5):
        assert torch.equal(converted(roads.images[:count]), calibrated(roads.images[:count]))


def test_converting_leaves_the_calibrated_graph_alone(roads, config):
    calibrated = roads.calibrated(config)
    before, code = calibrated(roads.images), calibrated.code
    first, again = convert(calibrated), convert(calibrated)
    assert calibrated.code == code and torch.equal(calibrated(roads.images), before)
    assert torch.equal(first(roads.images), again(roads.images))


def test_a_quantized_model_is_quantized_and_still_a_model(roads, small_vim, config):
    quantized = convert(roads.calibrated(config))
    assert isinstance(quantized, GraphModule)
    want, got = small_vim(roads.images), quantized(roads.images)
    assert not torch.equal(want, got)
    assert quantized(roads.images[:0]).shape == (0, 10)
    assert not any(value.requires_grad for value in quantized.state_dict().values())


def test_eight_bits_stay_close_and_more_bits_are_better(roads, small_vim):
    want = small_vim(roads.images)

    def error(config):
        return ((convert(roads.calibrated(config))(roads.images) - want).square().mean() / want.var()).item()

    errors = [error(QuantConfig(weights={"bits": count}, activations={"bits": count})) for count in (3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3


@settings(max_examples=6)
@given(weight_bits=bits, activation_bits=bits)
def test_any_bits_convert_exactly(weight_bits, activation_bits):
    torch.manual_seed(0)
    x = normal(3, 5, 7)
    config = QuantConfig(weights={"bits": weight_bits}, activations={"bits": activation_bits})
    prepared = prepare(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), (x,), config)
    assert torch.equal(convert(calibrate(prepared, [x], progress=False), lower=False)(x), prepared(x))


def test_quantize_is_all_three(small_vim, images):
    config = CONFIGS["w4a4"]
    batches = [(batch, torch.zeros(len(batch))) for batch in images.split(5)]
    prepared = calibrate(prepare(small_vim, (images[:5],), config), batches, progress=False)
    quantized = ptq4vm.quantize(small_vim, iter(batches), config, progress=False)
    assert torch.equal(quantized(images), convert(prepared)(images))


def test_the_default_is_eight_bits(small_vim, images):
    assert metadata_of(prepare(small_vim, (images,))).config == QuantConfig.w8a8()


def test_what_is_excluded_stays_in_floating_point(small_vim, images):
    config = QuantConfig(exclude=("layers.0.*", "*.dt_proj*"))
    names = [linear.name for linear in metadata_of(prepare(small_vim, (images,), config)).linears]
    assert names == [f"layers.1.mixer.{name}" for name in ("in_proj", "x_proj", "x_proj_b", "out_proj")]


def test_linears_outside_the_blocks_stay_in_floating_point():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6))])

        def forward(self, x):
            return self.head(self.layers[0](self.stem(x)))

    (linear,) = metadata_of(prepare(Model(), (normal(2, 5, 6),))).linears
    assert linear.name == "layers.0.0"


class BareParameter(nn.Module):
    """A weight that is no module's `weight`."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Parameter(normal(6, 4))

    def forward(self, x):
        return x @ self.projection


class SharedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        return self.proj(torch.relu(self.proj(x)))


@pytest.mark.parametrize("model", [nn.Linear(6, 4), BareParameter(), SharedWeight()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("smoothing", [None, 0.5])
def test_weights_may_stand_anywhere(model, smoothing):
    x = normal(3, 5, 6)
    prepared = prepare(model, (x,), QuantConfig(smoothing=smoothing))
    assert torch.equal(prepared(x), model(x))
    calibrate(prepared, [x], progress=False)
    assert torch.equal(convert(prepared, lower=False)(x), prepared(x))
    assert convert(prepared)(x).shape == model(x).shape


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled(False)": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def verbs(model, x, config):
    prepared = calibrate(prepare(model, (x[:2],), config), x.split(3), progress=False)
    quantized = convert(prepared)
    return prepared, quantized, ptq4vm.fuse(quantized)


FAST = {("ptq4vm", "no_grad"), ("best", "inference_mode")}


@pytest.mark.parametrize(
    ("recipe", "mode"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in itertools.product(("ptq4vm", "best"), MODES)
    ],
)
def test_gradients_may_be_off_around_everything_or_around_one_verb(recipe, mode):
    config = {"ptq4vm": LEARNED, "best": BEST}[recipe]
    want = verbs(blocks(), normal(8, 5, 8), config)
    with MODES[mode]():
        model, x = blocks(), normal(8, 5, 8)
        found = verbs(model, x, config)
    prepared = prepare(blocks(), (normal(2, 5, 8),), config)
    with MODES[mode]():
        calibrate(prepared, normal(8, 5, 8).split(3), progress=False)
    for made, other in (*zip(found, want, strict=True), (prepared, want[0])):
        values, same = made.state_dict(), other.state_dict()
        assert values.keys() == same.keys() and all(torch.equal(value, same[name]) for name, value in values.items())
        assert not any(value.is_inference() for value in (*made.parameters(), *made.buffers()))


def test_a_prepared_model_moved_under_inference_mode_learns_afterwards():
    prepared = prepare(blocks(), (normal(2, 5, 8),), LEARNED)
    with torch.inference_mode():
        for module in prepared.modules():
            module._parameters.update({name: nn.Parameter(value.clone()) for name, value in module._parameters.items()})
    assert all(parameter.is_inference() for parameter in prepared.parameters())
    report = metadata_of(calibrate(prepared, [normal(8, 5, 8)], progress=False)).blocks
    assert report[0]["loss_after"] < report[0]["loss_before"]


def test_quantize_takes_what_calibrate_takes():
    x, model, config = normal(8, 5, 8), blocks(), LEARNED
    want = ptq4vm.quantize(model, [x], config, progress=False)(x)
    buffer = torch.empty(4, 5, 8)
    for loader in (
        ({"label": 1, "x": part} for part in x.split(5)),
        (buffer.copy_(part) for part in x.split(4)),
        [(x[:0], 0), (x, 1)],
    ):
        assert torch.equal(ptq4vm.quantize(model, loader, config, progress=False)(x), want)
    endless = itertools.chain([x[:5], x[5:]], itertools.repeat(x))
    assert torch.equal(ptq4vm.quantize(model, endless, config, max_images=8, progress=False)(x), want)


def test_quantize_gives_a_model_of_two_inputs_both():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 4)

        def forward(self, x, shift, factor=2.0):
            return self.proj(x * factor) + shift

    model, x, shift = Two(), normal(6, 5, 8), normal(6, 5, 4)
    for item in ((x, shift, 3), {"factor": 3.0, "shift": shift, "x": x}):
        quantized = ptq4vm.quantize(model, [item], QuantConfig.minmax(8), progress=False)
        assert torch.allclose(quantized(x, shift), model(x, shift), atol=0.05)
    with pytest.raises(ValueError, match=r"calibration batch 0: the model's input 'shift' is missing; it holds 'x'"):
        ptq4vm.quantize(model, [{"x": x}])


def test_one_tensor_is_no_loader():
    with pytest.raises(TypeError, match=r"must yield batches: for one tensor of images write \[images\]"):
        ptq4vm.quantize(blocks(), normal(8, 5, 8))
    with pytest.raises(TypeError, match=r"must yield batches"):
        calibrate(prepare(blocks(), (normal(2, 5, 8),)), normal(8, 5, 8))
