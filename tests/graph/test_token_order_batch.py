"""A view may name the batch by its size, which is no source of tokens."""

import pytest
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


class Mixed(nn.Module):
    """Tokens of another image than the one they stand in."""

    def forward(self, x):
        return torch.sin(x).flip(0).exp()


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_a_graph_for_so_many_images_has_the_same_orders(images):
    """As Dynamo traces a model at first."""
    for model, tokens in ((Sizes(), [2, 3]), (Mixed(), None)):
        gm = torch.export.export(model, (torch.randn(images, 4, 6),)).module()
        (exp,) = gm.graph.find_nodes(op="call_function", target=aten.exp.default)
        found = token_map(exp.args[0])
        assert (found and found.tokens.tolist()) == tokens
