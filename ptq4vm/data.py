"""Reads images: a folder per class, as ImageNet has them, or scikit-learn's digits, which need no download."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from PIL import Image

DIGITS = "digits"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of the names of images, in upper or lower case, as torchvision has them."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read, whatever the name of the file; Pillow would start programs for some others."""

Transform = Callable[[Any], Tensor]

_TRAIN = ("train",)
_TEST = ("test", "val", "validation")
_SYSTEM = frozenset(("__macosx", "__pycache__", "lost+found", "system volume information", "recycler", "recycled"))
"""Folders that operating systems make, in lower case; the names of all others begin with one of `_HIDDEN`."""
_HIDDEN = (".", "@", "$", "#", "~")


class ImageDataset(Protocol):
    """Dataset with an image and its class by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class Digits(Dataset[tuple[Tensor, int]]):
    """Grey 8×8 digits that come with scikit-learn, as RGB images: 1347 to train, 450 to test.

    Args:
        split: `train` or `test`.
        transform: makes a tensor of a PIL image.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there is no such split.
    """

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


class Images(Dataset[tuple[Tensor, int]]):
    """Images in class folders, in the order of their paths.

    Reading one raises ValueError, with the path, for a file that is no image of 8 or 16 bits.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], class_to_idx: Mapping[str, int], transform: Transform
    ) -> None:
        self.samples, self.class_to_idx = list(samples), dict(class_to_idx)
        self.classes = list(self.class_to_idx)
        self.targets = [target for _, target in self.samples]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.samples[index]
        return self.transform(read_image(path)), target


def open_dataset(source: str, split: str, transform: Transform, *, num_classes: int | None = None) -> ImageDataset:
    """Opens a folder of images, or the digits.

    The number of a class is the place of its folder among the class folders of the train split, sorted by name, for
    every split. Folders named by ImageNet's ids (n01440764) have their places in ImageNet if `num_classes` is the size
    of one, or is None: so a part of ImageNet can be measured. Hidden and system folders are no classes.

    Args:
        source: `digits`, or a folder with `<split>/<class>/*`, or with `<class>/*` if it has no splits.
        split: `train`, or `test`, `val` or `validation`.
        transform: makes a tensor of a PIL image.
        num_classes: classes of the model. None skips the check, for images whose classes do not matter.

    Returns:
        Images and their classes by position.

    Raises:
        FileNotFoundError: the folder or its split does not exist, or has no images.
        ValueError: the class folders are not those of the model, or not those of the train split.

    Example:
        >>> from torchvision.transforms.functional import to_tensor
        >>> image, target = open_dataset("digits", "test", to_tensor)[0]
        >>> image.shape, target
        (torch.Size([3, 8, 8]), 1)
    """
    _names_of(split)
    if source == DIGITS:
        return _checked_digits(Digits(split, transform), num_classes)

    root = _root(Path(source), split)
    found = {folder.name: list(_images(folder)) for folder in sorted(_folders(root))}
    if not any(found.values()):
        raise FileNotFoundError(f"{root}: no images in its class folders; {_layout(source, split)}")
    places = _places(root, found, _train_folders(Path(source), root), num_classes)
    samples = [(path, places[name]) for name, paths in found.items() for path in paths]
    return Images(samples, places, transform)


def read_image(path: str) -> "Image.Image":
    """Reads a file as RGB with 8 bits; scales 16 bits, drops an alpha channel, and ignores EXIF's orientation.

    Raises ValueError, with the path, for a file that is no image, or is damaged or too large, or whose pixels have an
    unknown range.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not os.path.isfile(path):
            raise ValueError("it is no regular file")
        with Image.open(path, formats=FORMATS) as image:
            return _rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: cannot be read as an image: it is none of {', '.join(FORMATS)}") from error
    # a damaged file makes the reader fail halfway, with any kind of error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image: {reason}") from error


def _rgb(image: "Image.Image") -> "Image.Image":
    """Converts an image to RGB; scales 16-bit grey, which Pillow would clip to 255, which is white."""
    import numpy as np
    from PIL import Image

    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen:
        pixels = np.asarray(image).astype(np.uint32)
        if 0 < pixels.max() <= 255:
            raise ValueError("its pixels have 16 bits and none is above 255: save them in 8 bits")
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind}, whose range it does not tell: save them in 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def transform_for(model: nn.Module) -> Transform:
    """Returns the preprocessing with which timm evaluates a model.

    Args:
        model: a model of timm's registry.

    Returns:
        A function from a PIL image to a normalized tensor (C, H, W).

    Example:
        >>> import timm, ptq4vm.models
        >>> from PIL import Image
        >>> transform_for(timm.create_model("vim_nano_patch4_32.digits"))(Image.new("RGB", (8, 8))).shape
        torch.Size([3, 32, 32])
    """
    from timm.data import create_transform, resolve_model_data_config

    return create_transform(**resolve_model_data_config(model), is_training=False)


def calibration_batches(dataset: ImageDataset, images: int, batch_size: int, seed: int) -> list[Tensor]:
    """Draws distinct images, spread evenly over the classes if the dataset has `targets`.

    Args:
        dataset: images and their classes.
        images: number of images.
        batch_size: largest number of images in a batch.
        seed: the same seed draws the same images.

    Returns:
        Batches of images (B, C, H, W).

    Raises:
        ValueError: a number is below 1, or the dataset has too few images.

    Example:
        >>> from torchvision.transforms.functional import to_tensor
        >>> digits = open_dataset("digits", "train", to_tensor)
        >>> [batch.shape[0] for batch in calibration_batches(digits, images=20, batch_size=8, seed=0)]
        [8, 8, 4]
    """
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
    """Returns batches of every image once, in the order of the dataset.

    Args:
        dataset: images and their classes.
        batch_size: largest number of images in a batch.
        workers: number of processes that read images; 0 reads them in this one.
    """
    return DataLoader(dataset, batch_size=batch_size, shuffle=False, num_workers=workers)  # type: ignore[arg-type]


def _dealt(shuffled: list[int], targets: list[int] | None) -> list[int]:
    """Orders images by turns: first one image of each class, then a second of each, and so on."""
    if targets is None:
        return shuffled
    rounds: Counter[int] = Counter()
    turn = {}
    for index in shuffled:
        turn[index] = rounds[targets[index]]
        rounds[targets[index]] += 1
    return sorted(shuffled, key=turn.__getitem__)


def _names_of(split: str) -> tuple[str, ...]:
    """Returns the names of a split, the given one first."""
    for names in (_TRAIN, _TEST):
        if split in names:
            return tuple(sorted(names, key=lambda name: name != split))
    raise ValueError(f"split must be one of {', '.join(_TRAIN + _TEST)}, got {split!r}")


def _root(source: Path, split: str) -> Path:
    """Returns the folder that holds the class folders."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; {_layout(source, split)}")
    if _has_splits(source):
        for name in _names_of(split):
            if _folders(source / name):
                return source / name
        raise FileNotFoundError(f"{source}: no class folders for the split {split!r}; {_layout(source, split)}")
    return source


def _has_splits(source: Path) -> bool:
    """Whether a folder has splits; a class called train has images, not folders, and other classes beside it."""
    names = {folder.name for folder in _folders(source)}
    splits = names.intersection(_TRAIN + _TEST)
    return splits == names or any(_folders(source / name) for name in splits)


def _folders(folder: Path) -> list[Path]:
    """Returns the folders in a folder, without hidden and system folders; none if it is no folder."""
    if not folder.is_dir():
        return []
    return [child for child in folder.iterdir() if _is_shown(child.name) and child.is_dir()]


def _is_shown(name: str) -> bool:
    return not name.startswith(_HIDDEN) and name.lower() not in _SYSTEM


def _images(folder: Path) -> Iterator[str]:
    """Yields the paths of the images in a folder and below, in order; a link to a folder above is not followed."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(filter(_is_shown, folders))
        if real not in seen:
            names = (name for name in sorted(files) if not name.startswith(".") and name.lower().endswith(EXTENSIONS))
            yield from (os.path.join(place, name) for name in names)
        seen.add(real)


def _raise(error: OSError) -> None:
    raise error


def _train_folders(source: Path, root: Path) -> dict[str, bool]:
    """Returns the class folders of the train split, and whether they hold images; none if `root` is that split."""
    train = source / _TRAIN[0]
    if root in (source, train):
        return {}
    return {folder.name: any(_images(folder)) for folder in _folders(train)}


def _places(
    root: Path, found: Mapping[str, Sequence[str]], train: Mapping[str, bool], num_classes: int | None
) -> dict[str, int]:
    """Returns the class of every folder with images."""
    full = [name for name, paths in found.items() if paths]
    index = _imagenet_index(1000 if num_classes is None else num_classes)
    if index.keys() & set(full):
        if strangers := [name for name in full if name not in index]:
            raise ValueError(
                f"{root}: {_listing(strangers)} beside ImageNet's ids is no class of ImageNet; move it away"
            )
        return {name: index[name] for name in full}
    names = _class_names(root, {name: bool(paths) for name, paths in found.items()}, train, num_classes)
    full += [name for name, holds_images in train.items() if holds_images]
    if strangers := sorted(set(full).difference(names)):
        raise ValueError(
            f"{root}: the train split and this one differ in the class {_listing(strangers)}; move it away"
        )
    return {name: place for place, name in enumerate(names)}


def _class_names(
    root: Path, found: Mapping[str, bool], train: Mapping[str, bool], num_classes: int | None
) -> list[str]:
    """Returns the names of all classes in order, from the folders of both splits (name → has images).

    Empty folders count if the model has as many classes as there are folders, and do not if it has fewer.
    """
    lists = [sorted(folders) for folders in (train, found) if folders]
    if num_classes is None:
        empty = [name for name, full in (train or found).items() if not full]
        if empty:
            raise ValueError(
                f"{root}: a class without images, {_listing(empty)}, would move the others; delete the folder"
            )
        return lists[0]
    lists += [sorted(name for name, full in folders.items() if full) for folders in (train, found)]
    for names in lists:
        if len(names) == num_classes:
            return names
    where = " in the train split" if train else ""
    raise ValueError(
        f"{root}: {len(lists[0])} class folders{where} ({_listing(lists[0])}), but the model has {num_classes} "
        "classes: which is which cannot be told; make a folder for each class, in the train split if there is one"
    )


def _checked_digits(digits: Digits, num_classes: int | None) -> Digits:
    if num_classes not in (None, len(digits.classes)):
        raise ValueError(f"the digits have {len(digits.classes)} classes, the model has {num_classes}")
    return digits


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _layout(source: str | Path, split: str) -> str:
    return f"expected {source}/{split}/<class>/*.jpeg, or {source}/<class>/*.jpeg"


def _imagenet_index(num_classes: int) -> dict[str, int]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    return {name: place for place, name in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
