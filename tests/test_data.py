import hashlib
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.damaged_images import KINDS, damaged
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms import functional

from ptq4vm.data import DIGITS, Digits, calibration_batches, loader, open_dataset, read_image, transform_for


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Numbered:
    """Dataset whose image number i is the number i, of class i modulo `classes`."""

    def __init__(self, size: int, classes: int) -> None:
        self.targets = [index % classes for index in range(size)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        if index >= len(self):
            raise IndexError(index)
        return torch.tensor([index]), self.targets[index]


def tree(root, *images: str) -> str:
    """Writes one image at each path, grey levels 0, 1, 2 ... in the order given, and returns the folder."""
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
def test_a_folder_beside_ids_of_imagenet_is_named(tmp_path, stranger):
    source = tree(tmp_path, "n15075141/0.png", f"{stranger}/1.png")
    with pytest.raises(ValueError, match=f"{stranger} beside ImageNet's ids is no class"):
        open_dataset(source, "val", pixels)
    order = [(1, 0), (0, 1)] if stranger == "cat" else [(0, 0), (1, 1)]
    assert levels(open_dataset(source, "val", pixels, num_classes=2)) == order


JUNK = [".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", ".git", "#recycle", "__pycache__"]


@given(st.data())
def test_no_folder_moves_the_class_of_an_image(data):
    """Every label equals the clean folder's, or opening is refused."""
    ids = data.draw(st.booleans(), label="ImageNet's ids")
    classes = ["n01440764", "n01443537", "n15075141"] if ids else ["1", "10", "2"]
    places = {"n01440764": 0, "n01443537": 1, "n15075141": 999} if ids else {"1": 0, "10": 1, "2": 2}
    train = data.draw(st.booleans(), label="a train split")
    known = data.draw(st.booleans(), label="the model is known")
    kept = data.draw(st.sets(st.sampled_from(classes), min_size=1), label="classes of the test split")
    extra = data.draw(st.sampled_from([*JUNK, "a", "zebra", None]), label="extra folder")
    full, where = data.draw(st.booleans(), label="with an image"), data.draw(st.sampled_from(["train", "val"]))
    if not (train or ids) and kept != set(classes) and not (known and (extra is None or extra in JUNK)):
        return  # nothing tells which class is missing
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tree(root, *(f"val/{name}/{name}.png" for name in sorted(kept)))
        if train:
            tree(root, *(f"train/{name}/{name}.png" for name in classes))
        if extra is not None and not (extra not in JUNK and full and not (train or known or ids)):
            (root / where / extra).mkdir(parents=True)
            if full:
                tree(root, f"{where}/{extra}/{extra}.png")
        try:
            dataset = open_dataset(folder, "val", pixels, num_classes=(1000 if ids else 3) if known else None)
        except ValueError as error:
            whole = train or ids or kept == set(classes)
            assert not (whole and (extra is None or extra in JUNK)), error
            return
        found = {Path(path).stem: target for path, target in dataset.samples}
        assert found == {name: places[name] for name in kept}


@pytest.mark.parametrize("classes", [2, 4])
def test_other_classes_than_the_models_are_an_error(tmp_path, classes):
    source = tree(tmp_path, "cat/0.png", "dog/1.png", "emu/2.png")
    with pytest.raises(ValueError, match=f"3 class folders \\(cat, dog, emu\\), but the model has {classes} classes"):
        open_dataset(source, "val", pixels, num_classes=classes)
    with pytest.raises(ValueError, match=r"the digits have 10 classes, the model has"):
        open_dataset(DIGITS, "val", pixels, num_classes=classes)


def test_splits_of_which_neither_has_all_classes_are_an_error(tmp_path):
    source = tree(tmp_path, "train/a/0.png", "train/b/1.png", "val/a/2.png", "val/c/3.png", "val/zz/4.png")
    with pytest.raises(ValueError, match="the train split and this one differ in the class b"):
        open_dataset(source, "val", pixels, num_classes=3)


def test_an_empty_folder_counts_where_the_model_has_its_class(tmp_path):
    source = tree(tmp_path, "cat/0.png", "emu/1.png")
    (tmp_path / "dog").mkdir()
    assert levels(open_dataset(source, "val", pixels, num_classes=3)) == [(0, 0), (1, 2)]
    assert levels(open_dataset(source, "val", pixels, num_classes=2)) == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="a class without images, dog, would move the others"):
        open_dataset(source, "val", pixels)


def test_hidden_files_and_folders_hold_no_images(tmp_path):
    names = ("cat/0.PNG", "cat/deep/1.Jpeg", "cat/._0.png", "cat/@eaDir/0.png", "cat/.thumbnails/0.png")
    source = tree(tmp_path, *names)
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat", target_is_directory=True)
    assert [path.removeprefix(source) for path, _ in open_dataset(source, "val", pixels).samples] == [
        "/cat/0.PNG",
        "/cat/deep/1.Jpeg",
    ]


@given(st.integers(256, 65535), st.sampled_from([".png", ".tiff", ".pgm"]))
def test_sixteen_bits_are_scaled_to_the_nearest_of_eight(highest, suffix):
    values = np.linspace(0, highest, 64).astype(np.uint16).reshape(8, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/image{suffix}"
        if suffix == ".pgm":
            Path(path).write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
        else:
            Image.fromarray(values).save(path)
        expected = np.round(values / 257).astype(np.uint8)
        assert np.array_equal(np.asarray(read_image(path)), np.stack([expected] * 3, 2))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK"])
def test_modes_become_rgb_and_alpha_is_left_out(tmp_path, mode, recwarn):
    grey = Image.new("RGBA", (4, 4), (255, 255, 255, 7)).convert("RGB" if mode in ("1", "P", "CMYK") else "RGBA")
    image = grey.convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(256)
    path = str(tmp_path / ("image.tiff" if mode in ("CMYK", "PA") else "image.png"))
    image.save(path)
    assert read_image(path).mode == "RGB" and (np.asarray(read_image(path)) == 255).all() and not recwarn


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_image_is_named_in_one_line(tmp_path, kind):
    damaged(tmp_path / "photo 7.png", kind)
    with pytest.raises(ValueError, match=r"photo 7\.png: cannot be read as an image: ") as error:
        read_image(str(tmp_path / "photo 7.png"))
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("shape", [(40, 40), (60, 33), (9, 71)])
def test_the_transform_is_resizing_and_cropping_and_nothing_drawn(shape):
    """Augmentation, as in training (random crops, flips, colours, erasing), would make every accuracy wrong."""
    model = nn.Module()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 0.8}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8))
    transform = transform_for(model)
    small = functional.center_crop(functional.resize(image, 40, functional.InterpolationMode.BICUBIC), 32)
    expected = functional.normalize(functional.to_tensor(small), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert all(torch.equal(transform(image), expected) for _ in range(4))


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
