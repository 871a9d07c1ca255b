import hashlib
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from ptq4vm.data import DIGITS, Digits, calibration_batches, loader, open_dataset, transform_for


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Numbered:
    """Image number i is the number i; its class is i modulo `classes`."""

    def __init__(self, size: int, classes: int) -> None:
        self.targets = [index % classes for index in range(size)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        if index >= len(self):
            raise IndexError(index)
        return torch.tensor([index]), self.targets[index]


def tree(root, *images: str) -> str:
    """A folder with one image at each path, grey levels 0, 1, 2 ... in the order given."""
    for level, name in enumerate(images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(root / name)
    return str(root)


def levels(dataset) -> list[tuple[int, int]]:
    return [(int(image[0, 0, 0]), target) for image, target in (dataset[i] for i in range(len(dataset)))]


def test_the_digits_are_two_disjoint_stratified_parts():
    train, test = Digits("train", pixels), Digits("test", pixels)
    assert (len(train), len(test)) == (1347, 450)
    for part in (train, test):
        assert len(part.classes) == 10
        counts = Counter(part.targets)
        assert max(counts.values()) - min(counts.values()) <= 0.1 * len(part) / 5
        image, target = part[0]
        assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and target == part.targets[0]
        assert part.images.max() == 255 and part.images.min() == 0


def test_the_split_of_the_digits_never_changes():
    assert hashlib.sha256(Digits("test", pixels).images.tobytes()).hexdigest()[:16] == "13a9b8231c324db2"


def test_the_digits_name_the_extra_that_brings_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install ptq4vm\[demo\]"):
        open_dataset(DIGITS, "test", pixels)


@pytest.mark.parametrize("source", [DIGITS, "some/folder"])
def test_an_unknown_split_is_named(source):
    with pytest.raises(ValueError, match="split must be one of train, test, val, validation, got 'eval'"):
        open_dataset(source, "eval", pixels)


@pytest.mark.parametrize("folder", ["val", "validation", "test"])
@pytest.mark.parametrize("split", ["val", "validation", "test"])
def test_a_split_is_found_under_each_of_its_names(tmp_path, folder, split):
    source = tree(tmp_path, f"{folder}/cat/0.png", f"{folder}/dog/1.png", "train/cat/2.png", "train/dog/3.png")
    assert levels(open_dataset(source, split, pixels)) == [(0, 0), (1, 1)]
    assert levels(open_dataset(source, "train", pixels)) == [(2, 0), (3, 1)]


def test_the_name_that_was_asked_for_comes_first(tmp_path):
    source = tree(tmp_path, "val/cat/0.png", "test/cat/1.png")
    assert [levels(open_dataset(source, split, pixels))[0][0] for split in ("val", "test")] == [0, 1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_without_splits_the_folder_serves_for_all(tmp_path, split):
    source = tree(tmp_path, "car/0.png", "train/1.png")  # a class of railway pictures
    assert levels(open_dataset(source, split, pixels)) == [(0, 0), (1, 1)]


def test_ids_of_imagenet_become_its_classes(tmp_path):
    source = tree(tmp_path, "n01440764/0.png", "n15075141/1.png")
    dataset = open_dataset(source, "val", pixels)
    assert levels(dataset) == [(0, 0), (1, 999)] and dataset.targets == [0, 999]
    assert levels(open_dataset(source, "val", pixels, num_classes=2)) == [(0, 0), (1, 1)]


@pytest.mark.parametrize("stranger", ["cat", "n99999999"])
def test_other_names_are_numbered_in_their_order(tmp_path, stranger):
    source = tree(tmp_path, "n15075141/0.png", f"{stranger}/1.png")
    assert {target for _, target in levels(open_dataset(source, "val", pixels))} == {0, 1}


@pytest.mark.parametrize(
    "images, split",
    [
        ([], "val"),
        (["train/cat/0.png"], "val"),  # no such split
        (["val/0.png"], "val"),  # ImageNet's archive as it comes
        (["train/cat/0.png", "val/1.png"], "val"),
    ],
)
def test_a_split_without_class_folders_is_not_guessed(tmp_path, images, split):
    with pytest.raises(FileNotFoundError, match=r"no class folders for the split 'val'; expected .*/val/<class>"):
        open_dataset(tree(tmp_path, *images), split, pixels)


def test_a_missing_folder_and_one_without_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; expected .*<class>"):
        open_dataset(str(tmp_path / "nowhere"), "val", pixels)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in its class folders"):
        open_dataset(str(tmp_path), "val", pixels)


@pytest.mark.parametrize("size", [8, 32])
def test_a_model_gets_the_images_that_timm_would_give_it(size):
    model = nn.Module()
    model.pretrained_cfg = {
        "input_size": (3, size, size),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "crop_pct": 1.0,
    }
    image, _ = Digits("test", transform_for(model))[0]
    assert image.shape == (3, size, size)
    assert image.min() >= -2 and image.max() <= 2


sizes = st.integers(1, 40)


@given(sizes, st.integers(1, 7), sizes, st.integers(1, 12), st.integers(0, 2**31))
def test_calibration_takes_distinct_images_evenly_from_the_classes(size, classes, images, batch_size, seed):
    dataset, images = Numbered(size, classes), min(size, images)
    batches = calibration_batches(dataset, images, batch_size, seed)
    chosen = torch.cat(batches).flatten().tolist()
    assert len(set(chosen)) == images
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    counts = Counter(dataset.targets[index] for index in chosen)
    available = Counter(dataset.targets)
    level = max(counts.values())
    assert all(counts[name] >= min(available[name], level - 1) for name in available)
    again = calibration_batches(dataset, images, batch_size, seed)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_the_seed_chooses_and_classes_are_optional():
    dataset = Numbered(100, 3)
    first, second = (torch.cat(calibration_batches(dataset, 10, 4, seed)).flatten() for seed in (0, 1))
    assert not torch.equal(first, second)
    without_targets = list(dataset)
    assert len(torch.cat(calibration_batches(without_targets, 10, 4, 0)).unique()) == 10


@pytest.mark.parametrize("images, batch_size", [(11, 4), (0, 4), (4, 0), (-1, 4)])
def test_what_calibration_cannot_give_is_an_error(images, batch_size):
    with pytest.raises(ValueError, match=r"11 images, the dataset has 10|at least 1"):
        calibration_batches(Numbered(10, 2), images, batch_size, 0)


def test_the_loader_gives_every_image_once_in_order():
    batches = list(loader(Numbered(10, 3), 4))
    assert torch.cat([images for images, _ in batches]).flatten().tolist() == list(range(10))
    assert torch.cat([target for _, target in batches]).tolist() == Numbered(10, 3).targets
