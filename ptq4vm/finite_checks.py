"""Detects NaN and infinity in inputs and outputs; an integer model hides them, since codes have no value for either."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def finite_rows(x: Tensor) -> Tensor:
    """Returns whether all values of each image are finite: x (B, ...) → booleans (B,)."""
    if not x.numel():
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    return x.reshape(len(x), -1).isfinite().all(dim=1)


def check_finite(model: nn.Module) -> nn.Module:
    """Makes a model refuse inputs and outputs that hold NaN or infinity.

    Without the check a quantized model returns finite logits for such an image: NaN becomes the code 0, infinity the
    largest or smallest code. The check costs one pass over inputs and outputs. It belongs to this object alone: models
    that are saved, loaded or fused from it do not check.

    Args:
        model: any module whose inputs have the images on their first axis; it is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: raised by `forward`, with the position of the image.

    Example:
        >>> model = check_finite(nn.ReLU())
        >>> model(torch.tensor([[1.0], [torch.nan]]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ReLU: the input of image 1 of the batch, (2, 1), holds NaN or infinity, ...
    """
    model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
    model.register_forward_hook(_check_outputs)
    return model


def _check_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _check(module, (args, kwargs), "input")


def _check_outputs(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
    _check(module, outputs, "output")


def _check(module: nn.Module, values: Any, what: str) -> None:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            image = int((~finite_rows(value.detach())).nonzero()[0]) if value.ndim else 0
            raise ValueError(
                f"{type(module).__name__}: the {what} of image {image} of the batch, {tuple(value.shape)}, holds NaN "
                "or infinity, which a quantized model would hide; check the image and its preprocessing"
            )
