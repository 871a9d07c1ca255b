"""Chains of views, flips and pads as orders of tokens."""

import pytest
import torch
from helpers.public_models import order
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.graph.insert import aten
from ptq4vm.graph.token_order import token_map
from ptq4vm.models.scan_order import Direction


class There(nn.Module):
    """A value of its own, half of whose channels are put in the order of a direction, and back."""

    def __init__(self, direction: str, height: int, width: int) -> None:
        super().__init__()
        self.direction, self.size = Direction.parse(direction), (height, width)

    def forward(self, x):
        moved = self.direction.scan(torch.sin(x), *self.size).chunk(2, -1)[1]
        return torch.cos(self.direction.restore(torch.exp(moved), *self.size))


CASES = [
    ("h", 3, 4),
    ("h_flip", 3, 4),
    ("v", 3, 4),
    ("v_flip", 4, 3),
    ("w2", 4, 6),
    ("w2_flip", 3, 5),
    ("w3", 5, 4),
    ("w7_flip", 7, 7),
]


@pytest.mark.parametrize(("name", "height", "width"), CASES)
def test_the_order_of_a_direction_and_of_its_inverse(name, height, width):
    gm = capture(There(name, height, width), (torch.randn(2, height * width, 6),))
    (sin, exp, cos) = (
        next(node for node in gm.graph.nodes if node.target is target)
        for target in (aten.sin.default, aten.exp.default, aten.cos.default)
    )
    there = token_map(exp.args[0])
    tokens = torch.tensor([-1 if token is None else token for token in order(name, height, width)])
    assert there.source is sin and (there.first, there.last) == (3, 6)
    assert torch.equal(there.tokens, tokens)
    back = token_map(cos.args[0])
    assert back.source is exp and torch.equal(tokens[back.tokens], torch.arange(height * width))


class Views(nn.Module):
    def forward(self, x, y):
        x, y = torch.sin(x), torch.sin(y)
        return (
            x.transpose(1, 2).exp(),  # channels among the tokens
            torch.cat((x, y), 1).exp(),  # two sources
            x[:, :, ::2].exp(),  # every second channel
            x.flip(2).exp(),  # channels in another order
            torch.nn.functional.pad(x, (0, 1)).exp(),  # a channel of zeros
            torch.nn.functional.pad(x, (0, 0, 1, 0), value=1.0).exp(),  # a token that is not zero
            torch.cat((x[:, 2:], x[:, :2]), 1).exp(),
            x.unflatten(1, (2, 2))[:, 1].exp(),
        )


def test_what_is_no_order_of_tokens_and_what_is():
    gm = capture(Views(), (torch.randn(2, 4, 6), torch.randn(2, 4, 6)))
    maps = [token_map(node.args[0]) for node in gm.graph.find_nodes(op="call_function", target=aten.exp.default)]
    assert maps[:5] == [None] * 5
    assert maps[5].source.target is aten.pad.default  # is computed: only zeros are no values
    assert maps[6].tokens.tolist() == [2, 3, 0, 1]
    assert maps[7].tokens.tolist() == [2, 3]


class Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x):
        y = torch.nn.functional.silu(self.conv(x.permute(0, 3, 1, 2)))
        return y.permute(0, 2, 3, 1).transpose(1, 2).flatten(1, 2).exp()


def test_what_a_convolution_gives_has_its_channels_second():
    gm = capture(Map(), (torch.randn(2, 2, 3, 6),))
    (exp,) = gm.graph.find_nodes(op="call_function", target=aten.exp.default)
    found = token_map(exp.args[0])
    assert found.source.target is aten.silu.default and (found.first, found.last) == (0, 6)
    assert found.tokens.tolist() == order("v", 2, 3)
