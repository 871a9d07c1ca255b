"""Images: a folder a class, as ImageNet has them, or scikit-learn's digits, which need no download."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

DIGITS = "digits"

Transform = Callable[[Any], Tensor]

_TRAIN = ("train",)
_TEST = ("test", "val", "validation")


class ImageDataset(Protocol):
    """Image and class by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class Digits(Dataset[tuple[Tensor, int]]):
    """The 1797 grey 8×8 digits that come with scikit-learn, as RGB images: 1347 to train, 450 to test."""

    def __init__(self, split: str, transform: Transform) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("the digits are part of scikit-learn: pip install ptq4vm[demo]") from error

        digits = load_digits()
        train, test = train_test_split(range(len(digits.target)), test_size=450, random_state=0, stratify=digits.target)
        chosen = sorted(train if _names_of(split) == _TRAIN else test)
        self.images = (digits.images[chosen] * (255 / 16)).round().astype("uint8")
        self.targets: list[int] = digits.target[chosen].tolist()
        self.classes = [str(name) for name in digits.target_names]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index]).convert("RGB")), self.targets[index]


def open_dataset(source: str, split: str, transform: Transform, *, num_classes: int = 1000) -> ImageDataset:
    """`digits`, or the folder `source/<split>/<class>/*`, or without splits `source/<class>/*`.

    A class is the place of its folder. But folders named by ImageNet's ids (n01440764) get their places in
    ImageNet if `num_classes`, those of the model, is the size of one: so a part of ImageNet can be measured.
    """
    _names_of(split)
    if source == DIGITS:
        return Digits(split, transform)

    from torchvision.datasets import ImageFolder

    root = _root(Path(source), split)
    folder = ImageFolder(str(root), transform, allow_empty=True)
    if not folder.samples:
        raise FileNotFoundError(f"{root}: no images in its class folders; {_layout(source, split)}")
    index = _imagenet_index(num_classes)
    if index.keys() >= set(folder.classes):
        folder.samples = folder.imgs = [(path, index[folder.classes[place]]) for path, place in folder.samples]
        folder.targets = [target for _, target in folder.samples]
        folder.class_to_idx = {name: index[name] for name in folder.classes}
    return folder


def transform_for(model: nn.Module) -> Transform:
    """The preprocessing that timm evaluates the model with."""
    from timm.data import create_transform, resolve_model_data_config

    return create_transform(**resolve_model_data_config(model), is_training=False)


def calibration_batches(dataset: ImageDataset, images: int, batch_size: int, seed: int) -> list[Tensor]:
    """Distinct images, the same for the same seed, spread evenly over the classes if `targets` tells them."""
    if images < 1 or batch_size < 1:
        raise ValueError(f"images and batch_size must be at least 1, got {images} and {batch_size}")
    if images > len(dataset):
        raise ValueError(f"calibration asks for {images} images, the dataset has {len(dataset)}; ask for fewer")
    shuffled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = _dealt(shuffled, getattr(dataset, "targets", None))[:images]
    return [
        torch.stack([dataset[index][0] for index in chosen[start : start + batch_size]])
        for start in range(0, images, batch_size)
    ]


def loader(dataset: ImageDataset, batch_size: int, workers: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
    """Every image once, in the order of the dataset."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=False, num_workers=workers)  # type: ignore[arg-type]


def _dealt(shuffled: list[int], targets: list[int] | None) -> list[int]:
    """First one image of each class, then a second of each, and so on."""
    if targets is None:
        return shuffled
    rounds: Counter[int] = Counter()
    turn = {}
    for index in shuffled:
        turn[index] = rounds[targets[index]]
        rounds[targets[index]] += 1
    return sorted(shuffled, key=turn.__getitem__)


def _names_of(split: str) -> tuple[str, ...]:
    """The names a split goes by, the asked one first."""
    for names in (_TRAIN, _TEST):
        if split in names:
            return tuple(sorted(names, key=lambda name: name != split))
    raise ValueError(f"split must be one of {', '.join(_TRAIN + _TEST)}, got {split!r}")


def _root(source: Path, split: str) -> Path:
    """The folder that holds the class folders."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; {_layout(source, split)}")
    folders = _folders(source)
    splits = {folder.name for folder in folders if folder.name in _TRAIN + _TEST}
    # A class may be called train: then it holds images, not folders, and has classes beside it.
    if len(splits) < len(folders) and not any(_folders(source / name) for name in splits):
        return source
    for name in _names_of(split):
        if name in splits and _folders(source / name):
            return source / name
    raise FileNotFoundError(f"{source}: no class folders for the split {split!r}; {_layout(source, split)}")


def _folders(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if child.is_dir()]


def _layout(source: str | Path, split: str) -> str:
    return f"expected {source}/{split}/<class>/*.jpeg, or {source}/<class>/*.jpeg"


def _imagenet_index(num_classes: int) -> dict[str, int]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    return {name: place for place, name in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
