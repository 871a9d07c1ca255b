"""Values that cross the borders of blocks: whatever their form, the pieces in a row are the graph."""

import pytest
import torch
from helpers.captured_models import Block, canonical, tokens
from torch import nn

import ptq4vm
from ptq4vm.graph.batch_axis import BatchAxis
from ptq4vm.graph.borders import images_back, images_first
from ptq4vm.graph.capture import CaptureError
from ptq4vm.graph.partition import partition_blocks
from ptq4vm.graph.sites import find_linears
from ptq4vm.metadata import metadata_of

aten = torch.ops.aten


class First(Block):
    """Returns a value beside its result."""

    def __init__(self, first) -> None:
        super().__init__(6)
        self.first = first
        self.mean = torch.randn(1, 1, 6)
        self.register_buffer("table", torch.randn(5, 6))

    def forward(self, x):
        return super().forward(x), self.first(self, x)


class Crossing(nn.Module):
    """Two blocks for x (B, L, 6); `first(block, x)` is computed in one and read by `last(x, value)` after both."""

    def __init__(self, first, last=torch.add) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList((First(first), Block(6)))
        self.last = last

    def forward(self, x):
        x, value = self.layers[0](x)
        return self.last(self.layers[1](x), value)


def mask(model, x):
    """As Swin computes it in forward, by writing to parts."""
    made = torch.zeros(1, 5, 1)
    for i, part in enumerate((slice(0, -3), slice(-3, -1), slice(-1, None))):
        made[:, part] = i
    return made


def cached_mean(model, x):
    model.mean = model.mean.type_as(x)
    return model.mean


CONSTANTS = {
    "type_as": lambda m, x: m.mean.type_as(x),
    "cast and kept": cached_mean,
    "to of a tensor": lambda m, x: m.mean.to(x),
    "to the device": lambda m, x: m.mean.to(x.device, x.dtype),
    "zeros_like of a part": lambda m, x: torch.ones_like(x[:1]) * 0.5,
    "full_like": lambda m, x: torch.full_like(x, 0.5),
    "new_zeros": lambda m, x: x.new_zeros(x.shape[0], 1, 6) + 2,
    "new_full of a computed tensor": lambda m, x: (x * 2).new_full((1, 5, 1), 3.0),
    "expand_as": lambda m, x: m.mean.expand_as(x),
    "expand": lambda m, x: m.mean.expand(x.shape[0], -1, -1),
    "repeat": lambda m, x: m.mean.repeat(x.shape[0], 1, 1),
    "arange": lambda m, x: torch.arange(5, device=x.device)[:, None].to(x.dtype),
    "a table": lambda m, x: m.table[torch.arange(x.shape[1], device=x.device)].unsqueeze(0),
    "a mask": mask,
    "the batch": lambda m, x: x.shape[0] * 2,
    "a root of the batch": lambda m, x: x.shape[0] ** 0.5,
}
ORDERS = {
    "tokens first": (
        lambda m, x: x.transpose(0, 1).relu(),
        lambda x, v: x + v.transpose(0, 1),
        BatchAxis(1),
        (3, 5, 6),
    ),
    "windows": (
        lambda m, x: x.reshape(-1, 2, 3).sigmoid(),
        lambda x, v: x + v.reshape(-1, 5, 6),
        BatchAxis(0, 1, 5),
        (3, 5, 2, 3),
    ),
    "windows of the batch": (
        lambda m, x: x.transpose(0, 1).reshape(-1, 6).sigmoid(),
        lambda x, v: x + v.reshape(5, -1, 6).transpose(0, 1),
        BatchAxis(0, 5, 1),
        (3, 5, 6),
    ),
    "channels first, batch and tokens in one": (
        lambda m, x: x.reshape(-1, 6).t().contiguous().sigmoid(),
        lambda x, v: x + v.t().reshape(-1, 5, 6),
        BatchAxis(1, 1, 5),
        (3, 6, 5),
    ),
    "between tokens and channels": (
        lambda m, x: x.permute(1, 0, 2).reshape(-1, 3).cos(),
        lambda x, v: x + v.reshape(5, -1, 6).transpose(0, 1),
        BatchAxis(0, 5, 2),
        (3, 5, 2, 3),
    ),
    "heads before the batch": (
        lambda m, x: x.unflatten(2, (2, 3)).permute(2, 0, 1, 3).flatten(0, 1).tanh(),
        lambda x, v: x + v.unflatten(0, (2, -1)).permute(1, 2, 0, 3).flatten(2),
        BatchAxis(0, 2, 1),
        (3, 2, 5, 3),
    ),
}


def blocks_of(model: nn.Module):
    gm = canonical(model.eval(), tokens(3))
    return gm, partition_blocks(gm, list(find_linears(gm)))


def compose(gm, pieces, x):
    values = {"x": x}
    for piece in pieces:
        values |= piece({name: values[name] for name in piece.inputs})
    (result,) = gm.graph.output_node().all_input_nodes
    return values[result.name], values


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_computed_in_every_piece_and_cross_no_border(name):
    last = (lambda x, v: x * v) if "batch" in name else torch.add
    model = Crossing(CONSTANTS[name], last)
    gm, pieces = blocks_of(model)
    assert [len(piece.inputs) for piece in pieces[1:]] == [1] * (len(pieces) - 1)
    for count in (1, 2, 3, 5):
        x = tokens(count)
        assert torch.equal(compose(gm, pieces, x)[0], gm(x))
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("name", ORDERS)
def test_images_cross_in_any_order_and_are_handed_on_image_by_image(name):
    first, last, _, shape = ORDERS[name]
    model = Crossing(first, last)
    gm, pieces = blocks_of(model)
    for count in (1, 2, 3, 5):
        x = tokens(count)
        result, values = compose(gm, pieces, x)
        assert torch.equal(result, gm(x))
        assert all(len(values[output]) == count for piece in pieces for output in piece.outputs)
    (crossing,) = {name for piece in pieces for name in piece.outputs if name.endswith("_by_image")}
    _, all_values = compose(gm, pieces, tokens(3))
    assert all_values[crossing].shape == shape
    # image by image: what it is for one image alone
    for i in range(3):
        alone = compose(gm, pieces, tokens(3)[i : i + 1])[1][crossing]
        torch.testing.assert_close(all_values[crossing][i : i + 1], alone)


@pytest.mark.parametrize("name", ORDERS)
def test_moving_the_images_to_the_front_is_undone(name):
    axis = ORDERS[name][2]
    shape = [4] * (axis.index + 2)
    shape[axis.index] = axis.before * 3 * axis.after
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    with torch._subclasses.FakeTensorMode() as mode:
        x.meta["val"] = mode.from_tensor(torch.empty(shape, device="meta").to("cpu"))
    graph.output(images_back(graph, images_first(graph, x, axis), axis))
    value = torch.randn(shape)
    assert torch.equal(torch.fx.GraphModule(nn.Module(), graph)(value), value)


MIXED = {
    "a mean over images": lambda m, x: x.mean(0, keepdim=True),
    "a sum of all": lambda m, x: x.sum(),
    "images beside themselves": lambda m, x: torch.cat((x, x.flip(0))).sum(0, keepdim=True),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_belongs_to_no_image_is_refused_by_prepare_with_its_place(name):
    model = Crossing(MIXED[name])
    with pytest.raises(
        CaptureError, match=r"(mean|sum).* \(in layers\.0, at .*test_borders\.py:\d+ in `.*crosses the border"
    ):
        ptq4vm.prepare(model, (tokens(3),), ptq4vm.QuantConfig.minmax(8))


def test_an_order_that_mixes_images_is_refused():
    """Neighbours of an image are in its rows, so that no cut keeps the images apart."""
    model = Crossing(lambda m, x: (x + x.roll(1, 0)).reshape(-1, 6).relu(), lambda x, v: x + v.reshape(-1, 5, 6))
    with pytest.raises(CaptureError, match="crosses the border"):
        blocks_of(model)


@pytest.mark.parametrize("name", [*CONSTANTS, *ORDERS])
def test_models_whose_values_cross_are_calibrated(name):
    first, last = ORDERS[name][:2] if name in ORDERS else (CONSTANTS[name], torch.add)
    model, x = Crossing(first, last).eval(), tokens(4)
    prepared = ptq4vm.prepare(model, (x,), ptq4vm.QuantConfig.minmax(8))
    ptq4vm.calibrate(prepared, [x], progress=False)
    assert len(metadata_of(prepared).blocks) == 2
    torch.testing.assert_close(ptq4vm.convert(prepared)(x), model(x), atol=0.2, rtol=0)
