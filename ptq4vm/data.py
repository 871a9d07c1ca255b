"""Reads images: a folder per class, as ImageNet has them, or scikit-learn's digits, which need no download."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ptq4vm.class_folders import TRAIN, find_samples, split_names

if TYPE_CHECKING:
    from PIL import Image

DIGITS = "digits"
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read, whatever the name of the file; Pillow would start programs for some others."""

Transform = Callable[[Any], Tensor]


class ImageDataset(Protocol):
    """Dataset with an image and its class by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class Digits(Dataset[tuple[Tensor, int]]):
    """Grey 8×8 digits that come with scikit-learn, as RGB images: 1347 to train, 450 to test."""

    def __init__(self, split: str, transform: Transform) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("the digits are part of scikit-learn: pip install ptq4vm[demo]") from error

        digits = load_digits()
        train, test = train_test_split(range(len(digits.target)), test_size=450, random_state=0, stratify=digits.target)
        chosen = sorted(train if split_names(split) == TRAIN else test)
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
    split_names(split)
    if source == DIGITS:
        digits = Digits(split, transform)
        if num_classes not in (None, len(digits.classes)):
            raise ValueError(f"the digits have {len(digits.classes)} classes, the model has {num_classes}")
        return digits
    samples, places = find_samples(source, split, num_classes)
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
