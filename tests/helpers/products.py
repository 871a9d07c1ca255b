"""Models with one product each."""

from collections.abc import Callable

import torch
from torch import nn

from helpers.strategies import integers
from ptq4vm.graph.capture import capture
from ptq4vm.passes.prepare.canonicalize import canonicalize

aten = torch.ops.aten


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: their products and sums are exact in any order."""
    return integers(-8, 7, *shape, seed=seed).float()


def filled(model: nn.Module) -> nn.Module:
    for i, parameter in enumerate(model.parameters()):
        parameter.data = whole(*parameter.shape, seed=i)
    return model


class Of(nn.Module):
    """A function of x and of parameters with the given shapes."""

    def __init__(self, function: Callable, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in zip(("weight", "bias"), shapes, strict=False):
            self.register_parameter(name, nn.Parameter(whole(*shape, seed=len(name))))

    def forward(self, x):
        return self.function(x, *self._parameters.values())


class In(nn.Module):
    """A module under the name `op`."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x)


def of(function: Callable, *shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: In(Of(function, *shapes))


def layer(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: In(filled(make()))


def canonical(model: nn.Module, shape: tuple[int, ...]) -> torch.fx.GraphModule:
    return canonicalize(capture(model, (whole(2, *shape),)))


def targets(gm) -> list:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]
