"""Measures the inputs of linears: the paper's three phenomena as numbers (PTQ4VM section 3)."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vm.metadata import Stage, prepared_metadata
from ptq4vm.passes.quantized_nodes import quantized_linears
from ptq4vm.quantizers import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Phenomena:
    """Figures of one activation x (B, L, D)."""

    token_variance: float
    """max over min, over token positions, of the mean over images of max|x|: 1 where all tokens share one range."""
    channel_outliers: float
    """max over median, over channels, of max|x|: 1 where all channels share one range."""
    long_tail: float
    """max|x| over the 98th percentile of |x|: the paper finds 98 % of the values in a narrow range."""

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def phenomena(x: Tensor) -> Phenomena:
    """The figures of x (B, L, D)."""
    size = x.detach().float().abs()
    tokens, channels = size.amax(-1).mean(0), size.amax((0, 1))
    floor = torch.finfo(torch.float32).tiny
    rank = max(1, round(0.98 * size.numel()))
    tail = size.flatten().kthvalue(rank).values
    return Phenomena(
        token_variance=float(tokens.max() / tokens.min().clamp(min=floor)),
        channel_outliers=float(channels.max() / channels.median().clamp(min=floor)),
        long_tail=float(size.max() / tail.clamp(min=floor)),
    )


@torch.no_grad()
def observe(prepared: GraphModule, batches: Iterable[Tensor]) -> dict[str, Phenomena]:
    """The figures of every quantized linear's floating-point input; `prepared` is not calibrated yet."""
    metadata = prepared_metadata(prepared)
    if metadata.stage is Stage.CALIBRATED:
        raise ValueError("observe needs a prepared model that is not calibrated yet, to see floating-point values")
    linears = quantized_linears(prepared)
    for linear in linears:
        linear.input.forget()
        linear.input.mode = Mode.OBSERVE
    try:
        for batch in batches:
            prepared(batch)
        return {linear.name: phenomena(torch.cat(linear.input.observations)) for linear in linears}
    finally:
        for linear in linears:
            linear.input.forget()
            linear.input.mode = Mode.PASS
