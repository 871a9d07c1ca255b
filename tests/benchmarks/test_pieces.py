"""Models taken apart and put together again, and calls that are recorded."""

import contextlib
import copy
from collections import Counter

import pytest
import torch
from helpers.public_models import NANO, SHORT, create
from helpers.strategies import normal

import ptq4vm
from benchmarks.speed.graphs import WARMUP, Recorded, copied, recorded
from benchmarks.speed.pieces import Pieces, write_branch
from ptq4vm.config import QuantConfig

IMAGES = normal(3, 3, 32, 32, seed=0)
DEEPER = {"vim_nano_patch4_32": {"depth": 3}, "vmamba_nano_32": {"depths": (2, 1)}}


def made(name):
    torch.manual_seed(0)
    return create(name, **DEEPER[name]).eval()


@pytest.mark.parametrize("name, blocks, count", [(NANO[0], (1,), [3]), (NANO[2], (1, 4), [2, 1])])
@torch.no_grad()
def test_the_pieces_compute_what_the_model_does(name, blocks, count):
    model = made(name)
    pieces = Pieces(model)
    assert pieces.blocks == blocks and [pieces.count(place) for place in blocks] == count
    whole = pieces.assemble(torch.float32, lambda place, first: pieces.copy(place))
    assert torch.equal(whole(IMAGES), model(IMAGES))
    assert torch.equal(whole(IMAGES[:1]), model(IMAGES[:1]))  # zeros of another size
    assert not {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_blocks_that_are_alike_have_weights_of_their_own():
    pieces, made_of = Pieces(made(NANO[2])), []
    block = pieces.copy(1)
    whole = pieces.assemble(torch.bfloat16, lambda *places: made_of.append(places) or copy.deepcopy(block))
    assert made_of == [(1, 1), (2, 1), (4, 4)]
    memory = [parameter.data_ptr() for parameter in whole.parameters()]
    assert len(memory) == len(set(memory))
    assert {p.dtype for p in whole.pieces[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", [NANO[1], NANO[3]])
def test_other_models_are_refused_or_taken_whole(name):
    model = create(name, **SHORT[name]).eval()
    if hasattr(model, "norm_f"):
        with pytest.raises(ValueError, match=r"LocalVim has other pieces"):
            Pieces(model)
    else:
        assert len(Pieces(model).blocks) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEPER)
@torch.no_grad()
def test_fused_pieces_have_the_operators_of_the_fused_model(name):
    model = made(name)
    pieces = Pieces(model)
    streams = pieces.streams(IMAGES)

    def fused(model, inputs):
        with torch.enable_grad():
            prepared = ptq4vm.prepare(model, inputs, QuantConfig())
            lowered = ptq4vm.convert(ptq4vm.calibrate(prepared, [inputs], progress=False))
        return ptq4vm.fuse(lowered, activations=torch.bfloat16)

    blocks = {place: fused(pieces.pieces[place], streams[place]) for place in pieces.blocks}

    def block(place, first):
        made = copy.deepcopy(blocks[first])
        return write_branch(made, torch.float32 if pieces.ends(place) else torch.bfloat16)

    assembled, whole = pieces.assemble(torch.float32, block), fused(model, (IMAGES,))
    nodes = [node for piece in assembled.pieces if hasattr(piece, "graph") for node in ours(piece)]
    assert Counter(map(described, nodes)) == Counter(map(described, ours(whole)))


def ours(gm):
    return [node for node in gm.graph.nodes if str(node.target).startswith("ptq4vm.")]


def described(node):
    """An operator, and the type of a linear's results."""
    dtypes = [argument for argument in node.args if isinstance(argument, torch.dtype)]
    return str(node.target), *dtypes


def test_a_recorded_call_takes_new_inputs_and_runs_again_without():
    seen = []
    again = recorded(lambda x, y: seen.append(torch.is_inference_mode_enabled()) or x + y, torch.ones(2), torch.ones(2))
    assert torch.equal(again(), torch.full((2,), 2.0))
    assert torch.equal(again(torch.zeros(2)), torch.ones(2))
    assert torch.equal(again(torch.zeros(2), torch.zeros(2)), torch.zeros(2)) and all(seen)
    result = copied((torch.ones(2), [torch.zeros(1)], 3))
    assert torch.equal(result[0], torch.ones(2)) and result[2] == 3


class Streams:
    """A GPU that does everything at once, and remembers what was done in which order."""

    def __init__(self, monkeypatch) -> None:
        self.done = []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: self.record())

    def wait_stream(self, other) -> None:
        self.done.append("wait")

    def replay(self) -> None:
        self.done.append("replay")

    @contextlib.contextmanager
    def record(self):
        self.done.append("record")
        yield


def test_a_graph_is_recorded_after_warming_up_and_reads_its_own_inputs(monkeypatch):
    streams, given = Streams(monkeypatch), torch.ones(3)

    def call(x):
        streams.done.append(x)
        return x + 1

    again = Recorded(call, given)
    (own,) = again._inputs
    assert own is not given
    expected = ["wait", *[own] * WARMUP, "wait", "record", own]
    assert len(streams.done) == len(expected) and all(a is b for a, b in zip(streams.done, expected, strict=True))
    again(torch.full((3,), 5.0))
    assert torch.equal(own, torch.full((3,), 5.0)) and torch.equal(given, torch.ones(3))
    again()
    assert streams.done[len(expected) :] == ["replay", "replay"] and torch.equal(own, torch.full((3,), 5.0))
