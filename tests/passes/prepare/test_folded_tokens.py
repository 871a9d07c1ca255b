"""Laws of products whose batch and tokens share an axis: any order is found, and images stay independent."""

import torch
import torch.nn.functional as F
from helpers.strategies import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.metadata import metadata_of

PER_TOKEN = QuantConfig(smoothing=None, range_search="minmax")


class Folded(nn.Module):
    """Axes of x (B, …, 6) in any order, some of them folded into rows; a product; and back."""

    def __init__(self, order: tuple[int, ...], side: str) -> None:
        super().__init__()
        self.order, self.side = order, side
        self.weight = nn.Parameter(normal(4, 6))

    def forward(self, x):
        rows = x.exp().permute(*self.order, x.dim() - 1)
        folded = rows.reshape(-1, 6)
        if self.side == "linear":
            y = F.linear(folded, self.weight)
        else:
            y = (self.weight @ folded.t()).t() if self.side == "W @ x" else folded @ self.weight.t()
        back = [self.order.index(axis) for axis in range(len(self.order))]
        return y.reshape(*rows.shape[:-1], 4).permute(*back, len(back))


@st.composite
def folds(draw):
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda sizes: any(n > 1 for n in sizes)))
    order = draw(st.permutations(range(len(sizes) + 1)))
    return sizes, tuple(order), draw(st.sampled_from(("linear", "W @ x", "x @ W")))


@settings(max_examples=12, deadline=None)
@given(folds())
def test_any_order_of_images_and_tokens_is_found(fold):
    sizes, order, side = fold
    model, x = Folded(order, side).eval(), normal(5, *sizes, 6)
    prepared = prepare(model, (x[:2],), PER_TOKEN)
    (record,) = metadata_of(prepared).linears
    assert record.tokens == torch.Size(sizes).numel()
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-5, atol=1e-5)
    quantized = convert(calibrate(prepared, [x], progress=False))
    assert torch.equal(quantized(x), torch.cat([quantized(image) for image in x.split(1)]))
