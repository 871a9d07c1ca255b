"""Writes to tensors inside forward become values, without a second trace where it is certain what they change."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import ExportedProgram

from ptq4vm.graph.capture import capture
from ptq4vm.graph.functional_writes import is_write


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def check(function):
    x = torch.randn(3, 4, 6)
    gm = capture(Of(function), (x,))
    assert not any(map(is_write, gm.graph.nodes))
    for each in (x, torch.randn(5, 4, 6)):
        assert torch.equal(gm(each.clone()), function(each.clone()))


def filled(x):
    buffer = x.new_empty(x.shape[0], 4, 4, 6)
    buffer[:, 0] = x
    buffer[:, 1] = x.flip(1)
    buffer[:, 2:4] = buffer[:, 0:2].flip([-1])
    return buffer.view(x.shape[0], -1, 6)


def views_read_later(x):
    x = x.exp()
    first, turned = x[:, 0], x.transpose(1, 2)
    x[:, :2] += 1
    first.mul_(2)
    return x.sum(1) + first + turned.sum(2)


def written_through_views(x):
    x = x.exp()
    x.transpose(1, 2)[:, 1:3].unsqueeze(1).permute(0, 2, 3, 1).add_(1)
    x.narrow(2, 1, 2).relu_()
    return x


def in_place_chain(x):
    return F.silu(x.exp(), inplace=True).add_(1).clamp_(max=2).mul_(0.5)


def residual(x):
    x = x.exp()
    y = x * 2
    y += x
    x.zero_()
    return torch.cat((y, x), 1)


def another_type(x):
    x = x.exp()
    x[:, 0] = x[:, 1].double()
    x += x.double().sin()
    return x


WRITES = [filled, views_read_later, written_through_views, in_place_chain, residual, another_type]


@pytest.mark.parametrize("function", WRITES, ids=lambda function: function.__name__)
def test_writes_are_values_without_a_second_trace(function, monkeypatch):
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *_: pytest.fail("traced again"))
    check(function)


def of_an_input(x):
    x[:, 0] = 0
    return x * 2


def through_what_may_be_a_copy(x):
    x = x.exp()
    x.reshape(x.shape[0], -1).relu_()
    y = x.transpose(1, 2).reshape(x.shape[0], -1)
    x += 1
    return x.flatten(1) + y


@pytest.mark.parametrize("function", [of_an_input, through_what_may_be_a_copy], ids=lambda function: function.__name__)
def test_what_is_not_certain_is_left_to_a_second_trace(function):
    check(function)


VIEWS = [
    lambda x: x,
    lambda x: x[:, 1:],
    lambda x: x.transpose(1, 2),
    lambda x: x[:, :, 0],
    lambda x: x.unsqueeze(1),
    lambda x: x[:, ::2].transpose(-1, -2),
    lambda x: x.reshape(x.shape[0], -1),
    lambda x: x.flatten(1).contiguous(),
]
CHANGES = [
    lambda x: x.mul_(2),
    lambda x: x.add_(1),
    lambda x: x.copy_(x.flip(1).sin()),
    lambda x: x.relu_(),
    lambda x: x.fill_(3),
]
lists = st.lists(st.tuples(st.integers(0, len(VIEWS) - 1), st.integers(0, len(CHANGES) - 1)), min_size=1, max_size=4)


@settings(max_examples=12)
@given(lists, st.integers(0, len(VIEWS) - 1))
def test_any_writes_through_any_views(steps, last):
    def function(x):
        x = x.exp()
        kept = [VIEWS[view](x) for view, _ in steps]
        for (view, change), early in zip(steps, kept, strict=True):
            CHANGES[change](VIEWS[view](x))
            CHANGES[change](early)
        return torch.cat([value.reshape(x.shape[0], -1) for value in (x, *kept, VIEWS[last](x))], 1)

    check(function)
