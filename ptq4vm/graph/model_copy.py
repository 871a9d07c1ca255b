"""A copy of the caller's model that can be captured: ordinary tensors, and every weight a parameter of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves


def copied_model(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, with pruning, weight norms and parametrizations made permanent.

    Its tensors are leaves, and none is an inference tensor. Raises ValueError, which names the attribute, for a model
    that cannot be copied.
    """
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in _computed_tensors(model)}
    try:
        made = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied: {_uncopied(model)} ({type(error).__name__}: {str(error)[:200]}); "
            "delete that attribute, or make it again inside forward"
        ) from error
    with torch.no_grad():
        return make_permanent(made)


def own_tensors(model: nn.Module) -> nn.Module:
    """Replaces inference tensors, which can never learn, by copies, in place; what was shared stays shared."""
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None and value.is_inference():
                    made = copies.setdefault(value, copy.deepcopy(value))
                    tensors[name] = made  # type: ignore[assignment]
    return model


def make_permanent(model: nn.Module) -> nn.Module:
    """Replaces weights that are computed before every forward by parameters with their values, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _unparametrize(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
    return model


def _unparametrize(module: nn.Module) -> None:
    """As `parametrize.remove_parametrizations`, which changes the class, and that is the class of the original too."""
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that a module holds and that have a history of gradients, which `copy.deepcopy` refuses."""
    for module in model.modules():
        for value in tree_leaves(dict(vars(module), _modules=None)):
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _uncopied(model: nn.Module) -> str:
    """Names the attribute and the module that stopped `copy.deepcopy`."""
    for name, module in reversed(list(model.named_modules())):
        for key, value in vars(module).items():
            if key == "_modules":
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    copy.deepcopy(value)
            except Exception:
                return f"attribute {key!r} of {name or type(model).__name__} is of type {type(value).__name__}"
    return type(model).__name__
