"""x (images, 3, 4), y (images, 2)."""

import itertools
from collections import UserDict, namedtuple

import pytest
import torch
from helpers.strategies import normal, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.passes.calibrate import collect
from ptq4vm.passes.calibrate.collect import collect_inputs


class Two(nn.Module):
    def forward(self, x, y):
        return x.mean((1, 2)) + y.mean(1)


class Named(nn.Module):
    """Arguments that torch.export's placeholders do not keep as they are."""

    def forward(self, input):
        return input * 2


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, x):
        return self.embed(x)


def captured(model, *inputs):
    gm = capture(model, inputs)
    gm.register_buffer("place", torch.zeros(()))
    return gm


@pytest.fixture(scope="module")
def one():
    return captured(Named(), normal(2, 3, 4))


@pytest.fixture(scope="module")
def two():
    return captured(Two(), normal(2, 3, 4), normal(2, 2))


IMAGES = normal(12, 3, 4)


def only(gm, loader, **options):
    (value,) = collect_inputs(gm, loader, **options).values()
    return value


# --- what a batch is ---


@given(st.lists(st.integers(0, 5), min_size=1), seeds)
def test_batches_of_any_sizes_are_what_one_batch_is(one, sizes, seed):
    x = normal(sum(sizes) + 1, 3, 4, seed=seed)
    assert torch.equal(only(one, x.split([*sizes, 1])), x)


def test_a_loader_may_fill_one_buffer_again_and_again(one):
    buffer = torch.empty(4, 3, 4)

    def refilled():
        for batch in IMAGES.split(4):
            yield buffer.copy_(batch)

    assert torch.equal(only(one, refilled()), IMAGES)
    buffer = [IMAGES[:4].clone()]
    assert torch.equal(only(one, (buffer[0].mul_(2) for _ in range(2))), torch.cat((2 * IMAGES[:4], 4 * IMAGES[:4])))


Pair, Strange = namedtuple("Pair", "label input"), namedtuple("Strange", "image label")


@pytest.mark.parametrize(
    "item",
    [
        IMAGES,
        (IMAGES, 3),
        [IMAGES, torch.zeros(12)],
        {"labels": torch.zeros(12), "input": IMAGES},
        UserDict(input=IMAGES, labels=None),
        ({"input": IMAGES}, torch.zeros(12)),
        ((IMAGES,), torch.zeros(12)),
        Pair(label=torch.zeros(12), input=IMAGES),
        Strange(image=IMAGES, label=torch.zeros(12)),
    ],
    ids=["tensor", "pair", "list", "dict", "mapping", "dict and labels", "tuple and labels", "named", "in order"],
)
def test_an_item_holds_the_inputs_by_name_or_in_order(one, item):
    assert torch.equal(only(one, [item]), IMAGES)


def test_two_inputs_come_by_name_or_in_order(two):
    y = normal(12, 2, seed=1)
    for item in ((IMAGES, y), (IMAGES, y, "label"), {"y": y, "x": IMAGES}):
        found = collect_inputs(two, [item])
        assert torch.equal(found["x"], IMAGES) and torch.equal(found["y"], y)


@pytest.mark.parametrize("item", [3, ("cat", 1), "image.png", None, [], {"input": [1.0]}])
def test_an_item_of_something_else_is_an_error(one, item):
    with pytest.raises(
        ValueError, match=r"calibration batch 1: the model takes 1 tensor \(input\); the loader gave \("
    ):
        collect_inputs(one, [IMAGES, item])


def test_a_missing_input_is_named(one, two):
    with pytest.raises(ValueError, match=r"batch 0: the model's input 'input' is missing; it holds 'pixel_values'"):
        collect_inputs(one, [{"pixel_values": IMAGES}])
    with pytest.raises(ValueError, match=r"batch 0: the model takes 2 tensors \(x, y\); the loader gave \(Tensor\)"):
        collect_inputs(two, [(IMAGES,)])


def test_inputs_of_different_numbers_of_images_are_an_error(two):
    with pytest.raises(ValueError, match=r"batch 1: its inputs have different numbers of images \('x' 12, 'y' 3\)"):
        collect_inputs(two, [(IMAGES, normal(12, 2)), (IMAGES, normal(3, 2))])


# --- types, shapes, places ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrower_types_are_converted_exactly(one, dtype):
    found = only(one, [IMAGES, IMAGES.to(dtype)])
    assert found.dtype == torch.float32 and torch.equal(found[12:], IMAGES.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_other_types_are_refused(one, dtype):
    with pytest.raises(ValueError, match=rf"batch 1: input 'input' is {dtype}.*prepared for torch\.float32"):
        collect_inputs(one, [IMAGES, IMAGES.to(dtype)])


def test_whole_numbers_may_be_narrower_but_no_fractions():
    gm = captured(Tokens(), torch.ones(2, 6, dtype=torch.int64))
    x = torch.arange(5).repeat(6, 2)[:, :6]
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(only(gm, [x.to(dtype)]), x)
    for dtype in (torch.float32, torch.bool, torch.uint64):
        with pytest.raises(ValueError, match=rf"is {dtype}.*prepared for torch\.int64"):
            collect_inputs(gm, [x.to(dtype)])


@pytest.mark.parametrize("shape", [(12, 3, 5), (12, 4, 4), (12, 12), (12, 1, 3, 4), ()])
def test_other_shapes_are_refused(one, shape):
    with pytest.raises(ValueError, match=r"batch 0: input 'input' has the shape \(.*prepared for \(images, 3, 4\)"):
        collect_inputs(one, [torch.zeros(shape)])


def test_images_without_a_batch_are_refused(one):
    with pytest.raises(ValueError, match=r"the shape \(3, 4\).*a batch axis is missing: use unsqueeze\(0\)"):
        collect_inputs(one, IMAGES)


@pytest.mark.parametrize("bad", [torch.empty(2, 3, 4, device="meta"), torch.ones(2, 3, 4).to_sparse()])
def test_tensors_without_values_in_place_are_refused(one, bad):
    with pytest.raises(ValueError, match=r"batch 0: input 'input' is (on the device meta|of layout torch\.sparse)"):
        collect_inputs(one, [bad])


def test_gradients_and_subclasses_are_left_behind(one):
    class Image(torch.Tensor):
        pass

    found = only(one, [IMAGES.clone().requires_grad_(), IMAGES.as_subclass(Image)])
    assert type(found) is torch.Tensor and not found.requires_grad


# --- loaders without an end ---


def endless():
    for i in itertools.count():
        yield torch.full((5, 3, 4), float(i))


@pytest.mark.parametrize("most", [1, 5, 12])
def test_a_limit_takes_so_many_images_and_reads_no_batch_more(one, most):
    loader = endless()
    found = only(one, loader, max_images=most, ends=False)
    assert torch.equal(found, torch.arange(20).repeat_interleave(5)[:most, None, None].expand(-1, 3, 4).float())
    assert next(loader)[0, 0, 0] == (most + 4) // 5


def test_a_loader_without_end_is_refused_and_one_with_a_length_is_not(one, monkeypatch):
    monkeypatch.setattr(collect, "MOST_IMAGES", 11)
    with pytest.raises(ValueError, match=r"no length and gave more than 11 images.*pass max_images="):
        collect_inputs(one, endless(), ends=False)
    assert len(only(one, [IMAGES], ends=True)) == 12
    assert len(only(one, [IMAGES[:11]], ends=False)) == 11


def test_a_length_that_raises_is_none():
    class Stream:
        def __len__(self):
            raise TypeError("no length")

    assert not collect.has_length(Stream()) and not collect.has_length(iter([])) and collect.has_length([])


@pytest.mark.parametrize("loader", [[], [IMAGES[:0]], iter(())], ids=["list", "no images", "iterator"])
def test_an_empty_loader_is_an_error(one, loader):
    with pytest.raises(ValueError, match="the calibration loader is empty; give it at least one image"):
        collect_inputs(one, loader)


def test_a_limit_of_nothing_is_an_error(one):
    with pytest.raises(ValueError, match="max_images must be at least 1, got 0"):
        collect_inputs(one, [IMAGES], max_images=0)
