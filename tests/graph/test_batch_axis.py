"""Where the images lie in values that are written part by part."""

import pytest
import torch
from torch import nn

from ptq4vm.graph.batch_axis import BatchAxis, batch_axes
from ptq4vm.graph.capture import capture


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
    product = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.mul.Tensor)
    assert batch_axes(gm.graph)[product] == BatchAxis(1 if axis == 0 else 0)
