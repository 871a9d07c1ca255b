"""Products that stay as they are, with the reason in their metadata."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers.products import Of, aten, canonical, filled, layer, of, targets, whole
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.graph.sites import LEFT, POOLED, find_linears
from ptq4vm.passes.prepare.canonicalize import canonicalize

# torch 2.11 warns about its own classes when a graph is copied
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

STAYS = {
    "a linear without tokens": ((6,), POOLED, layer(lambda: nn.Linear(6, 4))(), aten.linear.default),
    "a linear of one value per image": ((1, 1, 6), POOLED, layer(lambda: nn.Linear(6, 4))(), aten.linear.default),
    "a matmul without tokens": ((6,), POOLED, of(lambda x, w: x @ w, (6, 4))(), aten.linear.default),
    "W @ x without tokens": ((6,), POOLED, of(lambda x, w: w @ x.t(), (4, 6))(), aten.matmul.default),
    "a weight for each token": (
        (3, 6),
        POOLED,
        of(lambda x, p: torch.bmm(x.transpose(0, 1), p), (3, 6, 4))(),
        aten.bmm.default,
    ),
    "a scaled addmm": (
        (6,),
        r"a bias \(N,\)",
        of(lambda x, w, c: torch.addmm(c, x, w, beta=2), (6, 4), (4,))(),
        aten.addmm.default,
    ),
    "baddbmm with one number": (
        (3, 6),
        r"a bias \(N,\)",
        of(lambda x, p, c: torch.baddbmm(c, x.flatten(0, 1).unsqueeze(0), p), (1, 6, 4), (1, 1, 1))(),
        aten.baddbmm.default,
    ),
    "baddbmm with a sum for each token": (
        (3, 6),
        r"a bias \(N,\)",
        of(lambda x, p, c: torch.baddbmm(c, x.transpose(0, 1), p.expand(3, 6, 4)), (6, 4), (3, 1, 4))(),
        aten.baddbmm.default,
    ),
    "einsum over tokens": (
        (3, 6),
        "more than a sum over channels",
        of(lambda x, w: torch.einsum("bld,nd->bn", x, w), (4, 6))(),
        aten.einsum.default,
    ),
    "einsum with a vector for each group": (
        (3, 6),
        "not a row of matrices",
        of(lambda x, w: torch.einsum("bkd,kd->bk", x, w), (3, 6))(),
        aten.einsum.default,
    ),
    "einsum without an arrow": (
        (3, 6),
        "'bld,dn' is not of the form",
        of(lambda x, w: torch.einsum("bld,dn", x, w), (6, 4))(),
        aten.einsum.default,
    ),
    "einsum of three": (
        (3, 6),
        "is not of the form",
        of(lambda x, w: torch.einsum("bld,nd,bld->bln", x, w, x), (4, 6))(),
        aten.einsum.default,
    ),
    "a strided 1×1 convolution": (
        (6, 4, 4),
        r"stride \[2, 2\]",
        layer(lambda: nn.Conv2d(6, 4, 1, stride=2))(),
        aten.conv2d.default,
    ),
    "a padded 1×1 convolution": (
        (6, 4),
        r"padding \[1\]",
        layer(lambda: nn.Conv1d(6, 4, 1, padding=1))(),
        aten.conv1d.default,
    ),
    "a 1×1 convolution of a 1×1 map": ((6, 1, 1), POOLED, layer(lambda: nn.Conv2d(6, 4, 1))(), aten.conv2d.default),
    "a convolution of length one": ((6, 1), POOLED, layer(lambda: nn.Conv1d(6, 4, 1))(), aten.conv1d.default),
    "a weight that is computed": (
        (3, 6),
        "its weight is computed",
        of(lambda x, w: F.linear(x, w.tanh()), (4, 6))(),
        aten.linear.default,
    ),
    "a bilinear form": (
        (3, 6),
        "multiplies two inputs",
        of(lambda x, w: F.bilinear(x, x, w), (4, 6, 6))(),
        aten.bilinear.default,
    ),
    "images among the tokens": (
        (3, 6),
        "cannot be derived",
        of(lambda x, w: F.linear(x.flatten().view(3, -1, 6).transpose(0, 1), w), (4, 6))(),
        aten.linear.default,
    ),
    "images in another order": (
        (3, 6),
        "cannot be derived",
        of(lambda x, w: F.linear(x.flip(0), w), (4, 6))(),
        aten.linear.default,
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_has_the_reason_in_its_metadata(name):
    shape, why, model, operator = STAYS[name]
    gm = canonical(model, shape)
    assert targets(gm).count(operator) == 1 and find_linears(gm) == {}
    (node,) = gm.graph.find_nodes(op="call_function", target=operator)
    assert [node] == [other for other in gm.graph.nodes if LEFT in other.meta]
    assert re.search(why, node.meta[LEFT])
    assert torch.equal(gm(whole(3, *shape)), model(whole(3, *shape)))


SILENT = {
    "a depth-wise 1×1 convolution": ((6, 3, 5), lambda: nn.Conv2d(6, 6, 1, groups=6), aten.conv2d.default),
    "a 3×3 convolution": ((6, 3, 5), lambda: nn.Conv2d(6, 4, 3, padding=1), aten.conv2d.default),
    "a product of activations": ((3, 6), lambda: Of(lambda x: x @ x.transpose(1, 2)), aten.matmul.default),
    "a product with a vector": (
        (3, 6),
        lambda: Of(lambda x, w: torch.einsum("bld,d->bl", x, w), (6,)),
        aten.einsum.default,
    ),
    "a product of weights": ((4, 6), lambda: Of(lambda x, w: x + (w @ w.t()).sum(), (4, 6)), aten.matmul.default),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_is_no_product_of_channels_with_a_matrix_stays(name):
    shape, make, operator = SILENT[name]
    model = filled(make())
    gm = canonical(model, shape)
    assert operator in targets(gm) and aten.linear.default not in targets(gm)
    assert not any(LEFT in node.meta for node in gm.graph.nodes)
    assert torch.equal(gm(whole(3, *shape)), model(whole(3, *shape)))


def test_blocks_are_told_apart():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = Of(lambda x, p: sum(F.linear(x, w) for w in p), (2, 6, 6))

        def forward(self, x):
            return self.op(x)

    gm = canonical(nn.Sequential(Block(), Block()), (3, 6))
    assert [(site.name, site.block) for site in find_linears(gm).values()] == [
        (f"{i}.op.weight.{k}", str(i)) for i in range(2) for k in range(2)
    ]


def test_models_without_products_stay_as_they_are(small_vim, images):
    gm = capture(small_vim, (images,))
    before = targets(gm)
    assert targets(canonicalize(gm)) == before


class Scores(nn.Module):
    """An einsum of two activations, which is no linear, before one with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        scores = torch.einsum("bld,bmd->blm", x, x).softmax(-1)
        return torch.einsum("bld,nd->bln", scores @ x, self.weight)


def test_an_einsum_of_activations_hides_no_later_linear():
    gm = canonicalize(capture(Scores().eval(), (torch.randn(2, 5, 8),)))
    assert [site.weight for site in find_linears(gm).values()] == ["weight"]
