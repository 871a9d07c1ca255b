"""Accuracy of a classifier, and its agreement with another one."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor]]  # images and their classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model made of a dataset; `top1`, `top5` and `agreement` in percent of the images."""

    images: int
    top1: float
    top5: float | None  # None below six classes, where it says nothing
    agreement: float | None  # images whose first class is also that of the reference
    divergence: float | None  # mean KL divergence of the predicted classes from the reference's, in nats
    loss: float  # mean cross-entropy
    seconds: float  # reading and preprocessing included

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    reference_predictions: Tensor | None = None,
    progress: bool = True,
    description: str = "evaluate",
) -> Evaluation:
    """Run the model, in the mode it is in, over every batch.

    `reference_predictions` are the logits of another model for the same images in the same order.
    """
    images = correct = among_five = agreeing = 0
    loss = divergence = 0.0
    start = time.perf_counter()
    for logits, target in _run(model, loader, progress, description):
        count, classes = logits.shape
        if int(target.max()) >= classes:
            raise ValueError(
                f"the data has the class {int(target.max())}, the model only {classes} classes "
                f"(0 to {classes - 1}); was it trained on this dataset?"
            )
        first = logits.argmax(dim=1)
        correct += int((first == target).sum())
        if classes > 5:
            among_five += int((logits.topk(5, dim=1).indices == target[:, None]).sum())
        if reference_predictions is not None:
            expected = reference_predictions[images : images + count].to(logits)
            if len(expected) == count:  # else the totals differ, which is said at the end
                agreeing += int((first == expected.argmax(dim=1)).sum())
                divergence += _divergence(expected, logits)
        loss += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
        images += count
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
        divergence=None if reference_predictions is None else divergence / images,
        loss=loss / images,
        seconds=seconds,
    )


def _divergence(expected: Tensor, logits: Tensor) -> float:
    """Summed over the images, never below the zero that equal logits have."""
    pair = nn.functional.log_softmax(logits.double(), 1), nn.functional.log_softmax(expected.double(), 1)
    return max(0.0, float(nn.functional.kl_div(*pair, reduction="sum", log_target=True)))


def predictions(model: nn.Module, loader: Batches) -> Tensor:
    """The logits of every image, (images, classes), on the CPU."""
    return torch.cat([logits.cpu() for logits, _ in _run(model, loader, progress=False, description="")])


def _run(model: nn.Module, loader: Batches, progress: bool, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 logits and classes of every batch, where the model is."""
    from tqdm import tqdm

    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    empty = True
    # None: no bar where the output is not a terminal. The bar is closed whatever ends the loop.
    with tqdm(loader, desc=description, disable=None if progress else True, unit="batch") as batches:
        for images, target in batches:
            with torch.inference_mode():
                logits = model(images.to(device))
            if logits.ndim != 2:
                raise ValueError(f"a classifier gives (images, classes), this model gave {tuple(logits.shape)}")
            empty = False
            yield logits.float(), target.to(device)
    if empty:
        raise ValueError("the loader has no batches: the dataset is empty, or drop_last leaves nothing of it")
