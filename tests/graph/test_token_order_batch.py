"""A view may name the batch by its size, which is no source of tokens."""

import torch
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.graph.insert import aten
from ptq4vm.graph.token_order import token_map


class Sizes(nn.Module):
    def forward(self, x):
        x = torch.sin(x)
        return x.reshape(x.shape[0], 2, 2, 6)[:, 1].exp()


def test_the_batch_in_a_view_is_read_through():
    gm = capture(Sizes(), (torch.randn(2, 4, 6),))
    (exp,) = gm.graph.find_nodes(op="call_function", target=aten.exp.default)
    found = token_map(exp.args[0])
    assert found.source.target is aten.sin.default
    assert found.tokens.tolist() == [2, 3] and (found.first, found.last) == (0, 6)
