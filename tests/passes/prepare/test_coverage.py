"""What prepare quantizes and what it leaves: records, their cost, and the line that every user sees."""

import logging

import pytest
import torch
import torch.nn.functional as F
from helpers.products import Of
from helpers.strategies import normal
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ptq4vm import QuantConfig, calibrate, convert, load, prepare, save
from ptq4vm.metadata import Coverage, metadata_of

MINMAX = QuantConfig.minmax(8)
POOLED = "pooled: one value per image, no tokens"


class Gate(nn.Module):
    """Squeeze and excitation of (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.gate = Gate(width)
        self.fc1, self.fc2 = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.gate(self.local(x)))))


class Net(nn.Module):
    """A stem of a convolution and a linear, two blocks, a reduction between them, and a bottleneck without a number."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(12, 8)
        self.blocks = nn.ModuleList([Block(8), Block(16)])
        self.reduction = nn.Linear(32, 16, bias=False)
        self.bottleneck = Block(16)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):  # (B, 16, 12)
        x = self.blocks[0](self.patches(x).transpose(1, 2).unflatten(2, (4, 4)))
        x = self.reduction(F.pixel_unshuffle(x, 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.up(self.bottleneck(self.blocks[1](x)))
        return self.head(x.mean((2, 3)))


GATES = [f"{block}.gate.{name}" for block in ("blocks.0", "blocks.1", "bottleneck") for name in ("reduce", "expand")]
X = normal(4, 16, 12)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def coverage(model, x=X, **changes) -> Coverage:
    return metadata_of(prepare(model, (x,), QuantConfig.minmax(8, **changes))).coverage


def left(found: Coverage) -> dict[str, str]:
    return {product.name: product.left for product in found.products if product.left is not None}


def test_all_that_tokens_reach_is_quantized_and_the_rest_is_named():
    assert left(coverage(net())) == {"patches": "stem", "head": "head"} | dict.fromkeys(GATES, POOLED)


def test_exclusions_are_named():
    assert left(coverage(net(), exclude=("reduction",)))["reduction"] == "excluded"


def test_an_option_quantizes_pooled_products_but_for_the_head():
    model = net()
    prepared = prepare(model, (X,), QuantConfig.minmax(8, pooled=True))
    assert left(metadata_of(prepared).coverage) == {"patches": "stem", "head": "head"}
    torch.testing.assert_close(prepared(X), model(X))
    facts = {linear.name: linear.tokens for linear in metadata_of(calibrate(prepared, [X], progress=False)).linears}
    assert [facts[name] for name in GATES] == [1] * len(GATES)
    assert (convert(prepared)(X) - model(X)).norm() < 0.1 * model(X).norm()


class Plain(nn.Module):
    """No numbered module: all linears on tokens count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(x)
        x = x * self.gate(x.mean(1)).unsqueeze(1)
        return self.head(x.mean(1))


@pytest.mark.parametrize("pooled", [False, True])
def test_without_blocks_the_head_that_reads_a_pooled_value_stays_apart(pooled):
    gate = {} if pooled else {"gate": POOLED}
    assert left(coverage(Plain(), pooled=pooled)) == {"head": "head"} | gate


def test_multiply_adds_are_those_of_a_hand_count():
    found = coverage(net())
    costs = {product.name: product.multiply_adds for product in found.products}
    assert costs == {
        "patches": 16 * 12 * 8,
        **{f"blocks.0.{name}": 16 * 8 * 16 for name in ("fc1", "fc2")},
        "reduction": 4 * 32 * 16,
        **{f"{block}.{name}": 4 * 16 * 32 for block in ("blocks.1", "bottleneck") for name in ("fc1", "fc2")},
        **{name: 2 * (8 if name.startswith("blocks.0") else 16) for name in GATES},
        "head": 4 * 3,
    }
    assert {product.name: product.multiply_adds for product in found.convolutions} == {
        "blocks.0.local": 16 * 8 * 9,
        "blocks.1.local": 4 * 16 * 9,
        "bottleneck.local": 4 * 16 * 9,
        "up": 4 * 16 * 4 * 4,
    }


WRITINGS = {
    "linear": (lambda x, w: F.linear(x, w), (4, 6), (3, 6)),
    "folded": (lambda x, w: w @ x.permute(2, 0, 1).reshape(6, -1), (4, 6), (3, 6)),
    "K weights": (lambda x, p: p @ x, (3, 4, 6), (3, 6, 5)),
    "einsum": (lambda x, w: torch.einsum("blhd,hdn->bln", x, w), (2, 3, 4), (5, 2, 3)),
    "einsum that stays": (lambda x, w: torch.einsum("b...d,nd->bn", x, w) + x.mean(), (4, 6), (3, 6)),
    "pooled": (lambda x, w: w @ x.t() + x.mean(), (4, 6), (6,)),
    "computed": (lambda x, w: x @ w.tanh(), (6, 4), (3, 6)),
    "addmm that stays": (lambda x, w, c: torch.addmm(c, x, w, beta=2), (6, 4), (6,)),
    "a bilinear form": (lambda x, w: F.bilinear(x, x, w), (4, 6, 6), (3, 6)),
    "padded": (lambda x, w: F.conv1d(x, w, padding=1), (4, 6, 1), (6, 3)),
    "grouped": (lambda x, w: F.conv1d(x, w, groups=3), (12, 6, 1), (18, 5)),
    "depth-wise": (lambda x, w: F.conv2d(x, w, groups=6), (6, 1, 3, 3), (6, 5, 5)),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=2), (6, 2, 2, 2), (6, 5, 5)),
}


class Beside(nn.Module):
    """A product beside a linear."""

    def __init__(self, function, weight) -> None:
        super().__init__()
        shapes = [weight, (4,)] if function.__code__.co_argcount == 3 else [weight]
        self.other, self.linear = Of(function, *shapes), nn.Linear(5, 5)

    def forward(self, x, y):
        return self.other(x), self.linear(y)


@pytest.mark.parametrize("name", WRITINGS)
def test_the_flops_are_those_of_torch(name):
    function, weight, shape = WRITINGS[name]
    model, images = Beside(function, weight).eval(), (normal(2, *shape), normal(2, 3, 5))
    found = metadata_of(prepare(model, images, MINMAX)).coverage
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*(value[:1] for value in images))
    records = (*found.products, *found.convolutions)
    counted = counter.get_total_flops() // 2 if name != "a bilinear form" else 3 * 4 * 36 + 3 * 25
    assert sum(record.multiply_adds for record in records) == counted


def test_one_line_says_it_to_everybody(caplog):
    with caplog.at_level(logging.WARNING):
        prepare(net(), (X,), MINMAX)
    (record,) = [record for record in caplog.records if record.name.startswith("ptq4vm")]
    assert record.name == "ptq4vm" and record.getMessage() == (
        "Net: quantizes 7 of 15 products of weights (89.3 % of multiply-adds); left: patches because stem, "
        f"blocks.0.gate.reduce, blocks.0.gate.expand, blocks.1.gate.reduce and 3 more because {POOLED}, head because "
        "head; 4 convolutions of neighbours (17.1 % of all multiply-adds) stay in floating point"
    )


def test_records_survive_saving_and_older_files_have_none(tmp_path):
    quantized = convert(calibrate(prepare(net(), (X,), MINMAX), [X], progress=False))
    found = metadata_of(quantized).coverage
    assert left(found) and metadata_of(load(save(quantized, tmp_path))).coverage == found


def test_quantized_convolutions_do_not_stay_in_floating_point():
    found = metadata_of(prepare(net(), (X,), QuantConfig.kscaled(8, state=None))).coverage
    floats = {record.name: record.left for record in found.convolutions if record.left is not None}
    assert floats == {"up": "convolution of neighbours"} and "head" not in left(found)
