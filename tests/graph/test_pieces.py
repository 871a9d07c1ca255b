"""Models without numbered blocks are calibrated in pieces, cut behind the sums of their residual stream."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import BEST, LEARNED, Block
from helpers.strategies import normal
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.graph.partition import partition_blocks
from ptq4vm.metadata import metadata_of
from ptq4vm.passes.quantized_nodes import quantized_linears

X = normal(8, 5, 8)


class Plain(nn.Module):
    """Three blocks with names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Block(8), Block(8), Block(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.three(self.two(self.one(x))).mean(1))


class Skip(Plain):
    """The first value is read again behind the last block: one more value crosses each border."""

    def forward(self, x):
        x = torch.sin(x)
        return self.three(self.two(self.one(x))) + x


class Dense(Plain):
    """Each block reads all values before: too many cross a border."""

    def forward(self, x):
        one = self.one(x)
        two = self.two(x + one)
        three = self.three(x + one + two)
        return torch.cat((x, one, two, three), 1)


class TokensFirst(Plain):
    """Between the blocks the batch is no first axis."""

    def forward(self, x):
        return self.three(self.two(self.one(x.transpose(0, 1)))).transpose(0, 1)


class Shared(nn.Module):
    """A value that linears of two pieces read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = F.gelu(x)
        y = x + self.a(x)
        return y + self.c(F.gelu(self.b(y))) * self.b(x)


PIECES = {
    Plain: [["one.fc1", "one.fc2"], ["two.fc1", "two.fc2"], ["three.fc1", "three.fc2"]],
    Skip: [["one.fc1", "one.fc2"], ["two.fc1", "two.fc2"], ["three.fc1", "three.fc2"]],
    Dense: [["one.fc1", "one.fc2"], ["two.fc1", "two.fc2", "three.fc1", "three.fc2"]],
    Shared: [["a"], ["b", "c", "b@1"]],
}


def model_of(kind) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def calibrated(kind, config, **options):
    return calibrate(prepare(model_of(kind), (X[:2],), config), [X], progress=False, **options)


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("config", [QuantConfig.minmax(8), LEARNED, BEST], ids=["minmax", "ptq4vm", "best"])
def test_each_piece_is_calibrated_and_learned_alone(kind, config):
    prepared = calibrated(kind, config)
    reports = metadata_of(prepared).blocks
    assert [report["linears"] for report in reports] == PIECES[kind]
    if config.learning is not None:
        assert all(0 < report["loss_after"] <= report["loss_before"] for report in reports)
    assert torch.equal(convert(prepared, lower=False)(X), prepared(X))


def test_pieces_are_named_by_the_module_around_their_linears():
    assert [report["block"] for report in metadata_of(calibrated(Plain, QuantConfig.minmax(8))).blocks] == [
        "one",
        "two",
        "three",
    ]
    assert [report["block"] for report in metadata_of(calibrated(Shared, QuantConfig.minmax(8))).blocks] == [
        "a",
        "piece 1",
    ]


def test_without_a_place_to_cut_there_is_one_piece():
    (report,) = metadata_of(calibrated(TokensFirst, QuantConfig.minmax(8))).blocks
    assert report["block"] == "model" and len(report["linears"]) == 6


@pytest.mark.parametrize("kind", PIECES)
def test_the_pieces_compute_the_graph(kind):
    prepared = prepare(model_of(kind), (X[:2],), LEARNED)
    values = {"x": X}
    for piece in partition_blocks(prepared, [linear.node for linear in quantized_linears(prepared)]):
        values |= piece({name: values[name] for name in piece.inputs})
        last = piece
    assert torch.equal(values[last.results[0]], prepared(X))


def test_linears_of_two_pieces_have_quantizers_of_their_own():
    inputs = [linear.input for linear in quantized_linears(prepare(model_of(Shared), (X,), QuantConfig.minmax(8)))]
    assert len({id(fake) for fake in inputs}) == len(inputs)


def test_an_interrupted_calibration_continues(tmp_path):
    whole = calibrated(Plain, BEST)
    calibrated(Plain, BEST, resume_dir=tmp_path)
    kept = sorted(tmp_path.glob("block_*"))
    assert len(kept) == 3
    for path in itertools.islice(reversed(kept), 1):
        path.unlink()
    again = calibrated(Plain, BEST, resume_dir=tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
