"""Finds the model of this package that computes what a model of its authors' code does, and fills it with its weights.

Names and shapes of the tensors tell the candidates (`identify`). Outputs for the example decide, since what no tensor
holds, such as the directions of scans, shows there alone.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ptq4vm.models.hierarchical import FeatureMaps
from ptq4vm.models.identify import Match, identify, translated
from ptq4vm.models.registry import ENTRIES, create_model
from ptq4vm.models.weight_names import without_prefix
from ptq4vm.terminal_text import listing

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of two outputs that counts as rounding, in standard deviations of the output."""


def replacement(model: nn.Module, example_inputs: tuple[Any, ...]) -> nn.Module:
    """Returns this package's model that computes the same, with the same weights, in evaluation mode.

    A warning in the log says what is replaced by what.

    Args:
        model: in evaluation mode and in float32, of any class; it is left alone. A model of this package is returned as
            it is.
        example_inputs: what both models are called with, to compare their outputs.

    Raises:
        ValueError: no model of this package fits every tensor and has the same outputs. The message names the closest
            one, and how it differs.

    Example:
        >>> import timm, ptq4vm.models
        >>> model = nn.DataParallel(timm.create_model("vim_nano_patch4_32")).eval()
        >>> ours = replacement(model, (torch.randn(2, 3, 32, 32),))
        >>> type(ours).__name__, ours.pretrained_cfg["architecture"]
        ('Vim', 'vim_nano_patch4_32')
    """
    if isinstance(model, (FeatureMaps, *(entry.model_class for entry in ENTRIES.values()))):
        return model
    weights = _weights(model)
    matches = identify(weights)
    fitting = [match for match in matches if match.fits]
    if not fitting:
        raise _refusal(model, f"none of ptq4vm has its tensors{_closest(matches)}")
    wanted = _outputs(model, example_inputs)
    if not all(isinstance(value, Tensor) and value.is_floating_point() and value.std() > 0 for value in wanted[0]):
        raise _refusal(model, "its outputs for the example are constant, not finite or no numbers, and decide nothing")
    models = [_filled(match, weights) for match in fitting]
    differences = [_difference(ours, example_inputs, wanted) for ours in models]
    equal = [i for i, difference in enumerate(differences) if difference <= TOLERANCE]
    found = listing(f"{match}: {difference:.0e}" for match, difference in zip(fitting, differences, strict=True))
    if not equal:
        raise _refusal(
            model, f"every tensor fits, but outputs for the example differ by more than rounding ({found} deviations)"
        )
    if len(equal) > 1:
        raise _refusal(model, f"the outputs for the example cannot tell models apart ({found} deviations)")
    chosen = equal[0]
    logger.warning(
        "replaced %s by ptq4vm's %s with the same weights (largest difference of outputs: %.0e standard deviations)",
        type(model).__name__,
        fitting[chosen],
        differences[chosen],
    )
    return models[chosen]


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"no model takes the place of {type(model).__name__}: {reason}; leave out replace=True to quantize it as it is"
    )


def _closest(matches: Sequence[Match]) -> str:
    if not matches:
        return ", nor similar ones"
    return f"; the closest is {matches[0]}: {'; '.join(matches[0].lines())}"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's tensors by their names, without the prefix of a wrapper such as nn.DataParallel."""
    state = model.state_dict()
    others = {value.dtype for value in state.values() if value.is_floating_point()} - {torch.float32}
    if others:
        raise _refusal(model, f"outputs are compared in float32, and it holds {listing(others)} (see model.float())")
    _, names = without_prefix(state, None, Path(type(model).__name__), ema=False)
    return {new: state[old] for old, new in names.items()} if len(names) == len(state) else state


def _filled(match: Match, weights: Mapping[str, Tensor]) -> nn.Module:
    """Creates a model with these weights, on their device; random numbers of the process stay as they are."""
    with torch.random.fork_rng(devices=[]):
        ours: nn.Module = create_model(match.name, **match.options)
    ours.load_state_dict(translated(ours, weights))
    return ours.to(next(iter(weights.values())).device).eval()


Outputs = tuple[list[Any], Any]
"""Values and their structure: a tensor, a list or a mapping of tensors."""


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> Outputs:
    """Calls a model, on a GPU without the TF32 of convolutions, which differs by more than `TOLERANCE`."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return tree_flatten(model(*inputs))


def _difference(model: nn.Module, inputs: tuple[Any, ...], wanted: Outputs) -> float:
    """Returns the largest difference of a model's outputs, in standard deviations; infinity where shapes differ."""
    try:
        outputs = _outputs(model, inputs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # other inputs than the example's
        logger.debug("%s cannot run on the example: %s", type(model).__name__, error)
        return math.inf
    if outputs[1] != wanted[1] or [value.shape for value in outputs[0]] != [value.shape for value in wanted[0]]:
        return math.inf
    return max(float((a - b).abs().max() / b.std()) for a, b in zip(outputs[0], wanted[0], strict=True))
