"""Values of tokens in a direction's order, put into the natural one; a direction may hold tokens of padding (-1)."""

from types import SimpleNamespace

import torch
from helpers.strategies import positive_sizes, seeds
from hypothesis import given

from ptq4vm.passes.lower.stacked_constants import StackedConstants


def stack(*orders: torch.Tensor) -> SimpleNamespace:
    branches = [SimpleNamespace(x=SimpleNamespace(tokens=order)) for order in orders]
    return SimpleNamespace(branches=branches, tokens=int(orders[0].max()) + 1)


@given(positive_sizes, positive_sizes, seeds)
def test_each_token_gets_its_own_value_and_padding_none(tokens, padding, seed):
    draw = torch.Generator().manual_seed(seed)
    places = torch.cat((torch.arange(tokens), torch.full((padding,), -1)))
    orders = [places[torch.randperm(len(places), generator=draw)] for _ in range(3)]
    values = [torch.randn(len(places), generator=draw) for _ in orders]
    found = StackedConstants.natural(stack(*orders), values)
    assert found.shape == (3, tokens)
    for row, order, value in zip(found, orders, values, strict=True):
        assert torch.equal(row[order[order >= 0]], value[order >= 0])


def test_one_value_for_all_tokens_stays_one_unless_another_direction_has_more():
    orders = torch.tensor([2, 0, 1]), torch.tensor([0, -1, 1, 2])
    one, several = torch.tensor([5.0]), torch.tensor([1.0, 9.0, 2.0, 3.0])
    assert torch.equal(StackedConstants.natural(stack(*orders), [one, one + 1]), torch.tensor([[5.0], [6.0]]))
    assert torch.equal(StackedConstants.natural(stack(*orders), [one, several]), torch.tensor([[5.0, 5, 5], [1, 2, 3]]))
