"""Capturing a model, finding its linears, cutting it into blocks."""

import pytest
import torch
from helpers.captured_models import Block, tokens
from helpers.strategies import normal
from torch import nn

from ptq4vm.graph.capture import CaptureError, capture
from ptq4vm.graph.sites import find_linears


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_left_alone(training):
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(5)).train(training)
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    gm = capture(model, (tokens(),))
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.zero_()
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == place and torch.equal(after[name], value) for name, (place, value) in before.items())
    assert all(module.training == training for module in model.modules())


def test_the_captured_model_is_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.9))
    assert torch.equal(capture(model, (tokens(),))(tokens()), model.eval()(tokens()))


@pytest.mark.parametrize("example", [1, 2, 3])
def test_the_batch_is_dynamic(small_vim, images, example):
    gm = capture(small_vim, (images[:example],))
    for count in (1, 2, 5):
        assert torch.equal(gm(images[:count]), small_vim(images[:count]))
    assert gm(images[:0]).shape == (0, 10)


def test_device_asserts_and_guards_are_gone(small_vim, images):
    gm = capture(small_vim, (images,))
    assert not [node for node in gm.graph.nodes if "assert" in str(node.target) or "guard" in str(node.target)]


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), inner)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_branch_on_values_is_an_error_that_names_the_module_and_the_way_out():
    with pytest.raises(CaptureError, match=r"cannot capture layers\.1\.1 \(Branching\).*torch\.where.*custom_op"):
        capture(Nested(Branching()), (tokens(),))


class OddBatch(nn.Module):
    def forward(self, x):
        return x if x.shape[0] == 2 else -x


def test_a_branch_on_the_batch_is_an_error():
    with pytest.raises(CaptureError, match="batch"):
        capture(Nested(OddBatch()), (tokens(),))


class Region(nn.Module):
    """A linear inside a region that torch.export may keep apart."""

    def __init__(self, region) -> None:
        super().__init__()
        self.inner, self.region = nn.Linear(6, 6), region

    def forward(self, x):
        with self.region():
            return self.inner(x)


def test_a_region_that_would_hide_its_linears_is_an_error():
    region = Region(lambda: torch.autocast("cpu", torch.bfloat16))
    with pytest.raises(CaptureError, match=r"keeps apart \(wrap_with_autocast\).*call the model without"):
        capture(Nested(region), (tokens(),))


@pytest.mark.parametrize("region", [torch.no_grad, torch.enable_grad], ids=lambda region: region.__name__)
def test_a_region_with_or_without_gradients_hides_nothing(region):
    model = Nested(Region(region))
    gm = capture(model, (tokens(),))
    names = ["layers.0", "layers.1.0", "layers.1.1.inner"]
    assert [site.name for site in find_linears(gm).values()] == names
    assert torch.equal(gm(tokens()), model(tokens()))


@pytest.mark.parametrize("examples", [(), (3,), (torch.tensor(1.0),)], ids=str)
def test_examples_without_a_batch_are_an_error(examples):
    with pytest.raises(ValueError, match="at least one tensor whose first axis is the batch"):
        capture(nn.Identity(), examples)


def test_another_resolution_is_an_error_that_names_both(small_vim, images):
    message = r"x: the model was captured for inputs of 3×16×16 \(16 patches\) and given 3×32×32 \(64 patches\)"
    with pytest.raises(ValueError, match=message + ".*resize the input, or prepare"):
        capture(small_vim, (images,))(normal(2, 3, 32, 32))


def test_another_token_count_is_an_error_that_names_both():
    gm = capture(Block(6), (tokens(),))
    with pytest.raises(ValueError, match=r"inputs of 5×6 \(5 tokens\) and given 7×6 \(7 tokens\)"):
        gm(normal(2, 7, 6))
