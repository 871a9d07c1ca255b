"""Graphs cut into blocks: the pieces in a row are the graph."""

import pytest
import torch
from helpers.captured_models import Block, Hierarchical, canonical, tokens
from torch import nn

from ptq4vm.graph.capture import CaptureError
from ptq4vm.graph.partition import partition_blocks
from ptq4vm.graph.sites import find_linears

aten = torch.ops.aten


class Flat(nn.Module):
    """No numbered module at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Skipping(nn.Module):
    """Between the blocks: a norm that only an output reads, and a pooling that only the last block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(6) for _ in range(3))
        self.outnorm, self.pool = nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, x):
        first = self.layers[0](x)
        second = self.layers[1](first)
        return self.outnorm(first), self.layers[2](second + self.pool(first))


class WindowBlock(Block):
    """Merges the windows of 4 tokens with the batch."""

    def forward(self, x, windows):
        return super().forward(x.reshape(windows, 4, 6)).reshape(x.shape)


class Windows(nn.Module):
    """A size that is computed once and read in all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WindowBlock(6) for _ in range(2))

    def forward(self, x):
        windows = 2 * x.shape[0]
        x = nn.functional.pad(x, (0, 0, 0, 3))
        for layer in self.layers:
            x = layer(x, windows)
        return x


class TwoInputs(nn.Module):
    """The second input is read by the last block alone; two outputs, the first from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(6) for _ in range(3))

    def forward(self, x, y):
        x = self.layers[0](x)
        middle = self.layers[1](x)
        return middle.mean(1), self.layers[2](middle + y)


class Again(nn.Module):
    """The first block runs once more after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(6) for _ in range(2))

    def forward(self, x):
        return self.layers[0](self.layers[1](self.layers[0](x)))


MODELS = {
    "vim": (None, ["stem", "layers.0", "layers.1", "head"]),
    "flat": (Flat, ["model"]),
    "sequential": (lambda: nn.Sequential(Block(6), Block(6), nn.LayerNorm(6)), ["stem", "0", "1", "head"]),
    "hierarchical": (
        Hierarchical,
        [
            "stem",
            "layers.0.blocks.0",
            "layers.0.blocks.1",
            "layers.1.blocks.0",
            "layers.1.blocks.1",
            "head",
        ],
    ),
    "again": (Again, ["stem", "layers.0", "layers.1"]),
    "two inputs": (TwoInputs, ["stem", "layers.0", "layers.1", "layers.2", "head"]),
    "skipping": (Skipping, ["stem", "layers.0", "layers.1", "layers.2", "head"]),
    "windows": (Windows, ["stem", "layers.0", "layers.1"]),
}


@pytest.fixture(params=MODELS)
def parts(request, small_vim, images):
    """A captured model, its pieces, and what gives it inputs for a number of images."""
    make, names = MODELS[request.param]
    torch.manual_seed(0)
    model = small_vim if make is None else make().eval()

    def inputs(count: int) -> tuple[torch.Tensor, ...]:
        if make is None:
            return (images[:count],)
        return tuple(tokens(count, seed=i) for i in range(2 if make is TwoInputs else 1))

    gm = canonical(model, *inputs(3))
    sites = find_linears(gm)
    blocks = [node for node, site in sites.items() if site.block is not None] or list(sites)
    return gm, partition_blocks(gm, blocks), inputs, names


def compose(gm, pieces, inputs):
    """The pieces one after another."""
    values = dict(zip((node.name for node in gm.graph.find_nodes(op="placeholder")), inputs, strict=True))
    for piece in pieces:
        values |= piece({name: values[name] for name in piece.inputs})
    return [values[node.name] for node in gm.graph.output_node().all_input_nodes]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_pieces_in_a_row_are_the_graph(parts, count):
    gm, pieces, inputs, _ = parts
    whole = gm(*inputs(count))
    whole = whole if isinstance(whole, (tuple, list)) else [whole]
    got = compose(gm, pieces, inputs(count))
    assert len(got) == len(whole) and all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


def test_the_pieces_are_what_precedes_each_block_and_what_follows(parts):
    _, pieces, _, names = parts
    assert [piece.name for piece in pieces] == names


def test_no_work_is_done_twice_or_left_out(parts):
    """Arithmetic of parameters alone may be repeated in every piece that reads it."""
    gm, pieces, _, _ = parts

    def work(module):
        data = {node for node in module.graph.nodes if node.op == "placeholder"}
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target is not aten.sym_size.int and data & set(node.all_input_nodes):
                data.add(node)
        return sorted(str(node.target) for node in data if node.op == "call_function")

    assert work(gm) == sorted(target for piece in pieces for target in work(piece.module))


def test_each_linear_is_in_the_piece_of_its_block(parts):
    gm, pieces, _, _ = parts
    where = {
        (str(node.target), piece.name) for piece in pieces for node in piece.module.graph.find_nodes(op="get_attr")
    }
    for site in find_linears(gm).values():
        if site.block is not None:
            assert (site.weight, site.block) in where


def pieces_of(model: nn.Module) -> dict[str, torch.fx.GraphModule]:
    gm = canonical(model.eval(), tokens())
    return {
        piece.name: piece
        for piece in partition_blocks(gm, [n for n, site in find_linears(gm).items() if site.block is not None])
    }


def reads(piece, name: str) -> bool:
    return any(str(node.target).startswith(name) for node in piece.module.graph.find_nodes(op="get_attr"))


def test_what_lies_between_two_blocks_opens_the_next():
    pieces = pieces_of(Hierarchical())
    assert reads(pieces["layers.1.blocks.0"], "layers.0.downsample")
    assert pieces["layers.0.blocks.1"].outputs == pieces["layers.1.blocks.0"].inputs


def test_a_block_hands_on_its_own_outputs_alone():
    pieces = pieces_of(Skipping())
    assert len(pieces["layers.0"].outputs) == 1
    assert reads(pieces["layers.2"], "pool") and reads(pieces["head"], "outnorm")


class Averaged(nn.Module):
    """Its second block reads a mean over the images of what its first one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Averaging(6) for _ in range(2))

    def forward(self, x):
        y, mean = self.layers[0](x)
        return self.layers[1](y - mean)[0]


class Averaging(Block):
    def forward(self, x):
        y = super().forward(x)
        return y, y.mean(0)


def test_a_border_without_images_is_an_error_that_names_the_node_and_the_line():
    place = r"mean \(in layers\.0, at .*test_blocks\.py:\d+ in `.*`\)"
    with pytest.raises(CaptureError, match=place + r" crosses the border of a block.*\(5, 6\)"):
        pieces_of(Averaged())


def test_the_pieces_share_their_parameters_with_the_graph(small_vim, images):
    gm = canonical(small_vim, images)
    pieces = partition_blocks(gm, list(find_linears(gm)))
    own = {id(parameter) for parameter in gm.parameters()}
    assert all(id(parameter) in own for piece in pieces for parameter in piece.module.parameters())
    before = compose(gm, pieces, (images,))[0]
    with torch.no_grad():
        gm.get_parameter("layers.1.mixer.out_proj.weight").mul_(2)
    after = compose(gm, pieces, (images,))[0]
    assert not torch.equal(before, after) and torch.equal(after, gm(images))


def test_parameters_still_learn_after_the_cut(small_vim, images):
    gm = canonical(small_vim, images)
    pieces = partition_blocks(gm, list(find_linears(gm)))
    compose(gm, pieces, (images,))[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in gm.parameters())
