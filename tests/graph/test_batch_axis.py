"""The axis of the images, through views and operators that compute."""

import pytest
import torch
from helpers.products import In, Of, aten, whole
from torch import nn

from ptq4vm.graph.batch_axis import BatchAxis, batch_axes, depend_on_images, per_image
from ptq4vm.graph.capture import capture

FIRST = BatchAxis(0)

KNOWN = {
    "an input": (lambda x: x, FIRST),
    "tokens first": (lambda x: x.transpose(0, 1), BatchAxis(1)),
    "images, then tokens": (lambda x: x.flatten(0, 1), BatchAxis(0, after=3)),
    "tokens, then images": (lambda x: x.transpose(0, 1).flatten(0, 1), BatchAxis(0, before=3)),
    "images between tokens": (lambda x: x.unflatten(2, (2, 3)).permute(1, 0, 2, 3).flatten(0, 2), BatchAxis(0, 3, 2)),
    "folded last": (lambda x: x.permute(2, 0, 1).reshape(6, -1), BatchAxis(1, after=3)),
    "half unfolded": (lambda x: x.flatten(0, 1).flatten().view(-1, 9), BatchAxis(0, after=2)),
    "computed": (lambda x: x.flatten(0, 1).softmax(-1).exp() + 1, BatchAxis(0, after=3)),
    "a mean over channels": (lambda x: x.transpose(0, 1).mean(2), BatchAxis(1)),
    "a token": (lambda x: x.transpose(0, 1)[1], FIRST),
    "all images": (lambda x: x[:, 1:].exp(), FIRST),
    "a stack": (lambda x: torch.stack((x, x.flip(1))), BatchAxis(1)),
    "two after another": (lambda x: torch.cat((x, x.flip(1))), BatchAxis(0, before=2)),
    "two stacked and folded": (lambda x: torch.stack((x, x.flip(1))).flatten(0, 1), BatchAxis(0, before=2)),
    "indices of tokens": (lambda x: x[:, torch.tensor([2, 0])], FIRST),
    "back in order": (lambda x: x.flatten().view(3, -1, 6).flatten().view(-1, 3, 6), FIRST),
}
UNKNOWN = {
    "mixed by a view": lambda x: x.flatten().view(3, -1, 6).transpose(0, 1),
    "mixed, then computed": lambda x: x.flatten().view(3, -1, 6).transpose(0, 1).exp(),
    "in another order": lambda x: x.flip(0),
    "rolled while folded": lambda x: x.flatten(0, 1).roll(1, 0),
    "two orders added": lambda x: x.flatten(0, 1) + x.transpose(0, 1).flatten(0, 1),
    "without images": lambda x: x.mean(0),
}


def axis_of(function):
    gm = capture(In(Of(lambda x: function(x) * 1)), (whole(2, 3, 6),))
    (result,) = gm.graph.output_node().all_input_nodes
    assert result.target is aten.mul.Tensor
    return batch_axes(gm.graph).get(result)


@pytest.mark.parametrize("name", KNOWN)
def test_the_order_is_derived_from_the_chain(name):
    function, axis = KNOWN[name]
    assert axis_of(function) == axis


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_mixes_the_images_has_no_axis(name):
    assert axis_of(UNKNOWN[name]) is None


def test_an_axis_unfolds_into_those_that_are_not_one():
    assert BatchAxis(0).unfolded() == [-1]
    assert BatchAxis(1, 3, 2).unfolded() == [3, -1, 2]


def test_sizes_and_parameters_depend_on_no_image():
    gm = capture(In(Of(lambda x, w: w.exp().expand(x.shape[0], 3, 6) + x, (3, 6))), (whole(2, 3, 6),))
    images = depend_on_images(gm.graph)
    named = {node.target: node in images for node in gm.graph.nodes if node.op == "call_function"}
    assert named[aten.add.Tensor] and not named[aten.exp.default] and not named[aten.expand.default]
    assert per_image(6, None) == 0


class Written(nn.Module):
    """Fills an empty tensor with two arrangements of x, and multiplies what lies in it."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x):
        B, C, L = x.shape
        shape = [B, C, L]
        shape.insert(self.axis, 3)
        y = x.new_empty(shape)
        whole = (slice(None),) * self.axis
        y[(*whole, 0)] = x
        y[(*whole, slice(1, 3))] = torch.stack([x.flip(-1), x + 1], self.axis)
        return y * 2


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_a_tensor_written_in_parts_has_the_order_of_what_it_is_written_into(axis):
    model, x = Written(axis), torch.randn(4, 2, 5)
    gm = capture(model, (x,))
    assert torch.equal(gm(x), model(x))
    product = next(node for node in gm.graph.nodes if node.target is aten.mul.Tensor)
    assert batch_axes(gm.graph)[product] == BatchAxis(1 if axis == 0 else 0)
