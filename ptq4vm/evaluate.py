"""Measures the accuracy of a classifier, and its agreement with another one."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vm.finite_checks import finite_rows

Batches = Iterable[tuple[Tensor, Tensor]]  # images and their classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures of a model on a dataset; `top1`, `top5` and `agreement` in percent of the images."""

    images: int
    top1: float
    top5: float | None
    """None below six classes, where it says nothing."""
    agreement: float | None
    """Images whose first class equals the reference's; None without a reference."""
    divergence: float | None
    """Mean KL divergence KL(reference ‖ model) of the predicted classes, in nats; None without a reference."""
    loss: float | None
    """Mean cross-entropy, in nats."""
    seconds: float
    """Time, with reading and preprocessing."""
    nonfinite: int = 0
    """Images whose pixels, logits or reference logits hold NaN or infinity. They count as wrong and as not agreeing.
    If there are any, `divergence` and `loss` are None, since a mean of the others would hide them."""
    reference_top1: float | None = None
    """None without a reference."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    reference_predictions: Tensor | None = None,
    progress: bool = True,
    description: str = "evaluate",
    check_finite: bool = False,
) -> Evaluation:
    """Runs a classifier over every batch and compares its predictions with the classes.

    Args:
        model: the classifier, run in the mode it is in.
        loader: batches of images (B, ...) and their classes (B,).
        reference_predictions: the logits (images, classes) of another model for the same images in the same order.
        progress: show a progress bar on a terminal.
        description: text before the bar.
        check_finite: raise at the first image whose pixels, logits or reference logits are not finite, instead of
            counting such images.

    Returns:
        The figures.

    Raises:
        ValueError: there are no images, or a class that the model does not have; or the reference has other images or
            classes; or, with `check_finite`, an image holds NaN or infinity, and the message has its position.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))]
        >>> evaluate(model, batches, progress=False).top1
        50.0
    """
    images = correct = among_five = agreeing = reference_correct = nonfinite = 0
    loss = divergence = 0.0
    start = time.perf_counter()
    for pixels, logits, target in _run(model, loader, progress, description):
        count, classes = logits.shape
        _check_target(target, classes)
        sound = {"pixels": finite_rows(pixels).to(logits.device), "logits": finite_rows(logits)}
        expected = _reference(reference_predictions, images, logits)
        if expected is not None:
            sound["reference logits"] = finite_rows(expected)
        if check_finite:
            _raise_at(sound, images)
        valid = torch.stack(list(sound.values())).all(dim=0)
        first = logits.argmax(dim=1)
        correct += int(((first == target) & valid).sum())
        if classes > 5:
            among_five += int(((logits.topk(5, dim=1).indices == target[:, None]) & valid[:, None]).sum())
        if expected is not None:
            expected_first = expected.argmax(dim=1)
            agreeing += int(((first == expected_first) & valid).sum())
            reference_correct += int(((expected_first == target) & sound["reference logits"]).sum())
            divergence += _divergence(expected[valid], logits[valid])
        loss += float(nn.functional.cross_entropy(logits[valid].double(), target[valid], reduction="sum"))
        images += count
        nonfinite += count - int(valid.sum())
    seconds = time.perf_counter() - start

    if reference_predictions is not None and len(reference_predictions) != images:
        raise ValueError(
            f"the reference has predictions for {len(reference_predictions)} images, "
            f"the loader has {images}; make them with the same loader"
        )
    return Evaluation(
        images=images,
        top1=100 * correct / images,
        top5=100 * among_five / images if classes > 5 else None,
        agreement=None if reference_predictions is None else 100 * agreeing / images,
        divergence=None if reference_predictions is None or nonfinite else divergence / images,
        loss=None if nonfinite else loss / images,
        seconds=seconds,
        nonfinite=nonfinite,
        reference_top1=None if reference_predictions is None else 100 * reference_correct / images,
    )


def _check_target(target: Tensor, classes: int) -> None:
    for wrong in () if not len(target) else (int(target.min()), int(target.max())):
        if not 0 <= wrong < classes:
            raise ValueError(
                f"the data has the class {wrong}, the model only {classes} classes "
                f"(0 to {classes - 1}); was it trained on this dataset?"
            )


def _reference(predictions: Tensor | None, start: int, logits: Tensor) -> Tensor | None:
    """Returns the reference's logits for a batch; None without a reference, or if it is too short."""
    if predictions is None:
        return None
    if predictions.ndim != 2 or predictions.shape[1] != logits.shape[1]:
        raise ValueError(
            f"the reference's predictions are {tuple(predictions.shape)}, and the model has {logits.shape[1]} classes: "
            "compare models of the same classes"
        )
    expected = predictions[start : start + len(logits)].to(logits)
    return expected if len(expected) == len(logits) else None


def _raise_at(sound: Mapping[str, Tensor], start: int) -> None:
    for what, rows in sound.items():
        if not rows.all():
            raise ValueError(f"image {start + int((~rows).nonzero()[0])}: its {what} hold NaN or infinity")


def _divergence(expected: Tensor, logits: Tensor) -> float:
    """Returns KL(reference ‖ model), summed over the images, and at least zero, its value for equal logits."""
    pair = nn.functional.log_softmax(logits.double(), 1), nn.functional.log_softmax(expected.double(), 1)
    return max(0.0, float(nn.functional.kl_div(*pair, reduction="sum", log_target=True)))


def predictions(model: nn.Module, loader: Batches) -> Tensor:
    """Returns the logits of every image, (images, classes), on the CPU.

    Args:
        model: the classifier, run in the mode it is in.
        loader: batches of images (B, ...) and their classes (B,).

    Raises:
        ValueError: there are no images, or the outputs are no logits.

    Example:
        >>> predictions(nn.Flatten(), [(torch.ones(3, 1, 2), torch.zeros(3))]).shape
        torch.Size([3, 2])
    """
    return torch.cat([logits.cpu() for _, logits, _ in _run(model, loader, progress=False, description="")])


def _run(
    model: nn.Module, loader: Batches, progress: bool, description: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields images, float32 logits and classes of every batch, the latter two on the model's device."""
    from tqdm import tqdm

    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    empty = True
    # disable=None shows no bar where the output is no terminal
    with tqdm(loader, desc=description, disable=None if progress else True, unit="batch") as batches:
        for images, target in batches:
            with torch.inference_mode():
                logits = model(images.to(device))
            if logits.ndim != 2:
                raise ValueError(f"a classifier returns (images, classes), this model returned {tuple(logits.shape)}")
            empty = False
            yield images, logits.float(), target.to(device)
    if empty:
        raise ValueError("the loader has no batches: the dataset is empty, or drop_last leaves nothing of it")
