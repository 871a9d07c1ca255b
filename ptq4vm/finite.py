"""NaN and infinity at the ends of a model: an integer model hides them, since codes have no value for either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def finite_rows(x: Tensor) -> Tensor:
    """Whether all values of an image are finite: x (B, ...), the result (B,) of booleans."""
    return (
        x.reshape(len(x), -1).isfinite().all(dim=1)
        if x.numel()
        else torch.ones(len(x), dtype=torch.bool, device=x.device)
    )


def check_finite(model: nn.Module) -> nn.Module:
    """Make a model refuse inputs that hold NaN or infinity, and outputs that do.

    Without it a quantized model returns finite logits for such an image: NaN becomes the code 0, infinity the largest
    or smallest code. The check costs one pass over inputs and outputs. It belongs to this object alone: what is
    saved or fused from it does not check.

    Args:
        model: any module whose inputs have the images on their first axis; it is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: in `forward`, with the position of the image.
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
