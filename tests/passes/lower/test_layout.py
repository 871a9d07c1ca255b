"""Layouts: the same values, with the movements that are needed and no others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.graph.element_numbers import moves_elements
from ptq4vm.graph.pipeline import clean_up
from ptq4vm.passes.lower.layout import simplify_layouts


def simplified(model, *inputs):
    """The captured graph before and after, which agree on another number of images too."""
    before = capture(model.eval(), inputs)
    after = clean_up(simplify_layouts(copy.deepcopy(before)))
    for values in (inputs, [torch.cat((x, 2 * x, x - 1)) for x in inputs]):
        with torch.no_grad():
            # SiLU and its kin differ in the last bit by where their inputs lie
            torch.testing.assert_close(after(*values), before(*values), rtol=1e-6, atol=1e-6)
    return after


def movements(gm):
    """Names of what moves elements of values, not of constants."""
    moving = [node for node in gm.graph.nodes if node.op == "call_function" and moves_elements(node)]
    return [node.target.__name__.partition(".")[0] for node in moving if node.meta["val"].shape[0] not in (1, 8)]


class ChannelsFirst(nn.Module):
    """Norms and linears on (B, C, H, W), as 1×1 convolutions are spelt, with a LayerScale and a residual stream."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.scale = nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        for _ in range(2):
            y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = self.linear(y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 5))
            x = x + self.scale * F.silu(y)
        return x.mean((2, 3))


def test_permutations_cancel_across_element_wise_operators():
    gm = simplified(ChannelsFirst(), torch.randn(2, 8, 3, 5))
    # in, for the norm and for the sum, and out again for the mean; between, only H × W ↔ L
    assert movements(gm).count("permute") == 3 and "transpose" not in movements(gm)


class Stacked(nn.Module):
    """K linears, stacked, viewed, split; sums of stacked pairs of which one is flipped, as VMamba merges its scans."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 6) for _ in range(4))

    def forward(self, x):
        y = torch.stack([linear(x).transpose(1, 2) for linear in self.linears], 1)
        y = y.view(x.shape[0], -1, x.shape[1]).view(x.shape[0], 4, 6, -1)
        low, rest = torch.split(y, [2, 4], dim=2)
        pair = rest[:, 0:2] + rest[:, 2:4].flip([-1])
        return torch.cat((low[:, 3].sin(), (pair[:, 0] - pair[:, 1]).cos()), 1)


def test_of_a_stack_each_part_is_read_where_it_was_made():
    gm = simplified(Stacked(), torch.randn(2, 5, 8))
    assert "stack" not in movements(gm) and "split_with_sizes" not in movements(gm)
    assert movements(gm).count("flip") == 2


class Filled(nn.Module):
    """A buffer that is filled in place, part by part."""

    def forward(self, x):
        x = x.exp()
        buffer = x.new_empty(x.shape[0], 2, 4, 6)
        buffer[:, 0] = x
        buffer[:, 1] = buffer[:, 0].flip(1)
        return F.layer_norm(buffer[:, 1], (6,)).sin() + buffer[:, 0].cos()


def test_what_fills_a_buffer_is_read_itself():
    gm = simplified(Filled(), torch.randn(2, 4, 6))
    assert not {"select_scatter", "slice_scatter", "new_empty"} & set(movements(gm))


class Embedded(nn.Module):
    """A sum with constants that differ from place to place and from channel to channel."""

    def __init__(self, shape):
        super().__init__()
        self.linear, self.constant = nn.Linear(8, 8), nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return torch.sigmoid(self.linear(x).transpose(1, 2) * self.constant).sum(1)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (8, 1), (8, 5), (1, 8, 5), (1, 1, 5)])
def test_constants_are_permuted_with_what_they_meet(shape):
    simplified(Embedded(shape), torch.randn(2, 5, 8))


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).transpose(1, 2).contiguous().relu()


def test_the_caller_gets_the_strides_that_the_model_gave():
    gm, x = simplified(Returned(), torch.randn(2, 5, 8)), torch.randn(3, 5, 8)
    assert gm(x).is_contiguous() and gm(x).view(3, -1).shape == (3, 40)


class Gated(nn.Module):
    """Values of different shapes, which are broadcast."""

    def __init__(self):
        super().__init__()
        self.linear, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x).transpose(1, 2)
        return (y * torch.sigmoid(self.gate(x).transpose(1, 2).mean(-1, keepdim=True))).flip(-1).sum(2)


def test_values_that_are_broadcast_are_left_as_they_are():
    simplified(Gated(), torch.randn(2, 5, 8))


STEPS = {
    "swap": lambda x: x.transpose(1, 2),
    "last": lambda x: x.transpose(-1, -2),
    "fold": lambda x: x.flatten(1, 2) if x.dim() > 3 else x.unflatten(1, (2, -1)),
    "flip": lambda x: x.flip(-1),
    "turn": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "half": lambda x: x.chunk(2, 1)[1],
    "cut": lambda x: x[..., 1:],
    "pad": lambda x: F.pad(x, (1, 0)),
    "join": lambda x: torch.cat((x, x.flip(1)), 1),
    "pair": lambda x: torch.stack((x, x.exp()), 2).sum(2),
    "stack": lambda x: torch.stack((x, x.sin()), 1)[:, 1],
    "names": lambda x: x.mT.swapaxes(1, 2).moveaxis(-1, 1).transpose(1, -1),
    "turned": lambda x: x.rot90(1, (1, x.dim() - 1)).reshape_as(x),
    "tiles": lambda x: torch.hstack((x, x.tile((1, 2) + (1,) * (x.dim() - 2)).tensor_split(2, 1)[0])),
    "windows": lambda x: x.unfold(1, 2, 2),
    "indices": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "twice": lambda x: x.repeat_interleave(2, 1),
    "silu": F.silu,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
    "parts": lambda x: F.gelu(torch.stack((x.exp(), x), 1).transpose(-1, -2), approximate="tanh")[:, 1],
    "scale": lambda x: x * 0.5,
    "self": lambda x: x + x.flip(1),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "batch": lambda x: x.reshape(x.shape[0], *x.shape[1:]).contiguous(),
}


class Chain(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.steps, self.linear = steps, nn.Linear(6, 4)

    def forward(self, x):
        x = self.linear(x)
        for step in self.steps:
            x = STEPS[step](x)
        return x


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=8))
def test_any_chain_computes_the_same(steps):
    torch.manual_seed(0)
    model, x = Chain(steps).eval(), torch.randn(2, 8, 6)
    try:
        fits = model(x).numel() > 0
    except (RuntimeError, IndexError):
        fits = False
    if fits:
        simplified(model, x)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("model", [ChannelsFirst, Stacked])
def test_a_graph_for_so_many_images_is_simplified_as_much(model, images):
    """As Dynamo traces a model at first."""
    torch.manual_seed(0)
    x = torch.randn(images, *((8, 3, 5) if model is ChannelsFirst else (5, 8)))
    before = torch.export.export(model().eval(), (x,)).module()
    after = clean_up(simplify_layouts(copy.deepcopy(before)))
    with torch.no_grad():
        assert torch.equal(after(x), before(x))
    dynamic = simplified(model(), torch.cat((x, x)))
    joining = ("permute", "stack", "split_with_sizes", "flip")
    ours, theirs = ([node.target.__name__.partition(".")[0] for node in gm.graph.nodes
                     if node.op == "call_function" and moves_elements(node)] for gm in (after, dynamic))  # fmt: skip
    assert [ours.count(name) for name in joining] == [theirs.count(name) for name in joining]


class Approximated(nn.Module):
    """Options of element-wise operators, behind a permutation and on a stack."""

    def forward(self, x):
        permuted = F.gelu(x.exp().transpose(1, 2), approximate="tanh")
        stacked = F.gelu(torch.stack((x.sin(), x.cos()), 1), approximate="tanh")
        return permuted.transpose(1, 2) + stacked[:, 0].exp() + stacked[:, 1].sin()


def test_options_of_element_wise_operators_are_kept():
    gm = simplified(Approximated(), torch.randn(2, 5, 8))
    assert not {"stack", "transpose", "permute"} & {*movements(gm)}


class Windows(nn.Module):
    """Values of windows in the place of images, stacked with themselves in other orders, and read back."""

    def forward(self, x):
        y = F.layer_norm(x.unflatten(1, (2, 4)).flatten(0, 1), (8,))
        back = y.unflatten(0, (-1, 2)).flatten(1, 2).flip(1).unflatten(1, (2, 4)).flatten(0, 1)  # of the whole image
        both = torch.stack((y, y.flip(1), y[:, [2, 0, 3, 1]], back), 1)
        return both[:, 1].cos(), both[:, 2].cos(), both[:, 3].cos()


def test_orders_in_windows_stay_inside_them():
    gm = simplified(Windows(), torch.randn(3, 8, 8))
    assert "stack" not in movements(gm)
