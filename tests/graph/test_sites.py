"""Linears of a graph: found, named, and told by block."""

import torch
from helpers.captured_models import Hierarchical, canonical, tokens
from torch import nn

from ptq4vm.graph.sites import find_linears


def test_linears_are_named_by_their_weight_in_the_order_of_the_graph():
    found = find_linears(canonical(Hierarchical(), tokens())).values()
    blocks = [f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]
    inner = [(f"{block}.{name}", block) for block in blocks for name in ("up", "down")]
    inner.insert(4, ("layers.0.downsample", None))  # its numbered module is a stage: there are blocks inside
    assert [(site.name, site.block) for site in found] == [("stem", None), *inner]  # the head sees no tokens
    assert [(site.tokens, site.in_features, site.out_features) for site in found][:3] == [
        (5, 6, 4),
        (5, 4, 8),
        (5, 8, 4),
    ]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        return self.proj(torch.relu(self.proj(x)))


def test_a_shared_weight_is_numbered_by_call():
    gm = canonical(Shared(), tokens())
    assert [(site.name, site.weight) for site in find_linears(gm).values()] == [
        ("proj", "proj.weight"),
        ("proj@1", "proj.weight"),
    ]


class Product(nn.Module):
    def forward(self, x, y):
        return nn.functional.linear(x, y[0])


class Table(nn.Module):
    """A parameter, without a batch, multiplies the first weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(1, 5, 6))
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(x + self.first(self.table))


def test_a_product_without_images_is_no_linear_on_tokens():
    assert [site.name for site in find_linears(canonical(Table(), tokens())).values()] == ["second"]


def test_a_product_of_two_inputs_is_no_linear_of_a_weight():
    assert find_linears(canonical(Product(), tokens(), tokens(seed=1))) == {}
