"""Finds the images in class folders, and the number of each class, for every layout that ImageNet is stored in."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of the names of images, in upper or lower case, as torchvision has them."""

TRAIN = ("train",)
_TEST = ("test", "val", "validation")
_SYSTEM = frozenset(("__macosx", "__pycache__", "lost+found", "system volume information", "recycler", "recycled"))
"""Folders that operating systems make, in lower case; the names of all others begin with one of `_HIDDEN`."""
_HIDDEN = (".", "@", "$", "#", "~")


def find_samples(source: str, split: str, num_classes: int | None) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Returns the images of a split, as paths and classes, and the classes by the names of their folders.

    `source`, `split` and `num_classes` are those of `ptq4vm.data.open_dataset`, which also lists the errors.
    """
    root = _root(Path(source), split)
    found = {folder.name: list(_images(folder)) for folder in sorted(_folders(root))}
    if not any(found.values()):
        raise FileNotFoundError(f"{root}: no images in its class folders; {_layout(source, split)}")
    places = _places(root, found, _train_folders(Path(source), root), num_classes)
    return [(path, places[name]) for name, paths in found.items() for path in paths], places


def split_names(split: str) -> tuple[str, ...]:
    """Returns the names of a split, the given one first."""
    for names in (TRAIN, _TEST):
        if split in names:
            return tuple(sorted(names, key=lambda name: name != split))
    raise ValueError(f"split must be one of {', '.join(TRAIN + _TEST)}, got {split!r}")


def _root(source: Path, split: str) -> Path:
    """Returns the folder that holds the class folders."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; {_layout(source, split)}")
    if _has_splits(source):
        for name in split_names(split):
            if _folders(source / name):
                return source / name
        raise FileNotFoundError(f"{source}: no class folders for the split {split!r}; {_layout(source, split)}")
    return source


def _has_splits(source: Path) -> bool:
    """Whether a folder has splits; a class called train has images, not folders, and other classes beside it."""
    names = {folder.name for folder in _folders(source)}
    splits = names.intersection(TRAIN + _TEST)
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
    train = source / TRAIN[0]
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


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _layout(source: str | Path, split: str) -> str:
    return f"expected {source}/{split}/<class>/*.jpeg, or {source}/<class>/*.jpeg"


def _imagenet_index(num_classes: int) -> dict[str, int]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    return {name: place for place, name in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
