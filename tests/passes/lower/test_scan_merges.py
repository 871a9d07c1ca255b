"""Sums of scans: found in any order of movements and additions, and only where nothing else reads a part."""

import pytest
import torch
from torch import nn

from ptq4vm import ops
from ptq4vm.graph.capture import capture
from ptq4vm.passes.lower.scan_merges import find_merge

ORDERS = [torch.arange(6), torch.tensor([0, 3, 1, 4, 2, 5]), torch.arange(5, -1, -1), torch.tensor([5, 2, 4, 1, 3, 0])]
"""Rows and columns of 2 × 3 tokens, and both reversed."""


class Scans(nn.Module):
    def __init__(self, merge):
        super().__init__()
        self.merge = merge

    def forward(self, x):
        A, inputs = -torch.ones(4, 1), [x[:, order] for order in ORDERS]
        return self.merge(
            *(ops.selective_scan(u, u, A, u[..., :1], u[..., :1], None, None, None, True) for u in inputs)
        )


def columns(y):
    return y.unflatten(1, (3, 2)).transpose(1, 2).flatten(1, 2)


def each(a, b, c, d):
    return ((columns(b) + a) + c.flip(1)) + columns(d.flip(1))


FOUND = {
    "each put back": (each, 1.0),
    "columns put back together": (lambda a, b, c, d: a + c.flip(1) + columns(b + d.flip(1)), 1.0),
    "their mean": (lambda *scans: each(*scans) / 4, 0.25),
    "on maps": (lambda *scans: each(*scans).unflatten(1, (2, 3)).exp(), 1.0),
}
LEFT = {
    "not put back": lambda a, b, c, d: a + b + c + d,
    "one missing": lambda a, b, c, d: a + columns(b) + c.flip(1) + d.exp(),
    "one twice": lambda a, b, c, d: each(a, b, c, d) + a,
    "a difference": lambda a, b, c, d: each(a, b, c, -d),
    "another reader of one": lambda a, b, c, d: (each(a, b, c, d).exp(), b.mean(1)),
    "another reader of a part": lambda a, b, c, d: ((e := a + c.flip(1)) + columns(b) + columns(d.flip(1)), e.exp()),
}


def found(merge):
    gm = capture(Scans(merge), (torch.randn(2, 6, 4),))
    return find_merge(gm.graph.find_nodes(op="call_function", target=ops.selective_scan.default), ORDERS)


@pytest.mark.parametrize("name", FOUND)
def test_a_sum_in_natural_order_is_found(name):
    merge, factor = FOUND[name]
    assert found(merge).factor == factor


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_such_sum_is_none(name):
    assert found(LEFT[name]) is None
