"""Sums over stacks become additions; others stay."""

import copy

import pytest
import torch
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.graph.insert import aten
from ptq4vm.graph.pipeline import clean_up
from ptq4vm.passes.lower.layout import simplify_layouts
from ptq4vm.passes.lower.stacked_sums import add_stacked_sums


class Summed(nn.Module):
    def __init__(self, spelling, count):
        super().__init__()
        self.spelling, self.linears = spelling, nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x):
        return self.spelling([linear(x) for linear in self.linears], x)


def added(spelling, count=4):
    """The graph with additions, which agrees with the captured one, and the targets of what it calls."""
    torch.manual_seed(0)
    before = capture(Summed(spelling, count).eval(), (torch.randn(2, 5, 8),))
    after = clean_up(simplify_layouts(clean_up(add_stacked_sums(copy.deepcopy(before)))))
    for images in (1, 3):
        x = torch.randn(images, 5, 8)
        with torch.no_grad():
            ours, theirs = after(x), before(x)
        # torch adds up to four numbers in their order too
        assert torch.equal(ours, theirs) if count <= 4 else torch.allclose(ours, theirs, atol=1e-6)
    return [node.target for node in after.graph.nodes if node.op == "call_function"]


SPELLINGS = {
    "first": lambda ys, x: torch.stack(ys).sum(0),
    "second": lambda ys, x: torch.stack(ys, 1).sum(1),
    "from the end": lambda ys, x: torch.stack(ys, -2).sum(-2),
    "last": lambda ys, x: torch.stack(ys, -1).sum(dim=(-1,)),
    "joined": lambda ys, x: torch.cat([y.unsqueeze(1) for y in ys], 1).sum(1),
    "flipped": lambda ys, x: torch.stack([y.flip(1) for y in ys], 1).sum(1),
    "products": lambda ys, x: (torch.stack(ys, 1) * torch.stack([y.mean(1, keepdim=True) for y in ys], 1)).sum(1),
    "shared": lambda ys, x: (torch.stack(ys, 1) * x.unsqueeze(1)).sum(1),
}


@pytest.mark.parametrize("count", [2, 4, 9])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_sum_over_a_stack_adds_its_parts(name, count):
    targets = added(SPELLINGS[name], count)
    assert aten.sum.dim_IntList not in targets and aten.stack.default not in targets
    assert targets.count(aten.add.Tensor) == count - 1


OTHERS = {
    "tokens": lambda ys, x: ys[0].sum(1),
    "channels": lambda ys, x: torch.stack(ys, 1).sum(-1),
    "images": lambda ys, x: torch.stack(ys).sum(1),
    "two axes": lambda ys, x: torch.stack(ys, 1).sum((1, 2)),
    "an axis that stays": lambda ys, x: torch.stack(ys, 1).sum(1, keepdim=True),
    "another type": lambda ys, x: torch.stack(ys, 1).sum(1, dtype=torch.float64),
    "of halves": lambda ys, x: torch.stack(ys, 1).bfloat16().sum(1),
    "of a function": lambda ys, x: torch.stack(ys, 1).softmax(1).sum(1),
    "of parts": lambda ys, x: ys[0].unflatten(2, (4, 2)).sum(2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_stay(name):
    assert aten.sum.dim_IntList in added(OTHERS[name])


def test_a_product_that_others_read_is_not_taken_apart():
    def spelling(ys, x):
        products = torch.stack(ys, 1) * x.unsqueeze(1)
        return products.sum(1) + products.amax(1)

    assert aten.sum.dim_IntList in added(spelling)


def test_a_large_stack_stays():
    assert aten.sum.dim_IntList in added(lambda ys, x: torch.stack(ys, 1).sum(1), 17)
