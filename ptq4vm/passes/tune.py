"""End-to-end tuning: scales, smoothing, norms and biases, by KL to the logits in floating point.

It comes after the blocks, over the whole prepared graph. What is not a linear's own moves too, so results are to be
reported apart from those of calibration alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx import GraphModule

from ptq4vm.config import Learning, Tuning
from ptq4vm.graph import finish as finish_graph
from ptq4vm.passes.learn import Values, descend, finish, learnables
from ptq4vm.passes.smooth import merge_smoothing
from ptq4vm.quantizer import QuantizedLinear

_OURS = (".log_smooth", ".correction", ".log_factor")
_UNTUNED = "ptq4vm_untuned"


@torch.no_grad()
def log_probabilities(prepared: GraphModule, images: Values, batch_size: int) -> Tensor:
    """Of all images, (images, classes), by a prepared graph as it is."""
    batches = torch.arange(_count(images)).split(batch_size)
    return torch.cat([_run(prepared, images, batch) for batch in batches])


def _count(images: Values) -> int:
    return len(next(iter(images.values())))


def _run(module: GraphModule, images: Values, batch: Tensor) -> Tensor:
    result = module(*(value[batch] for value in images.values()))
    if isinstance(result, (tuple, list)) and len(result) == 1:
        (result,) = result
    if not isinstance(result, Tensor) or result.ndim != 2:
        raise ValueError("tuning needs a classifier that gives (images, classes); for this model use tuning=None")
    return F.log_softmax(result.float(), 1)


def restore_vectors(prepared: GraphModule) -> None:
    """Puts back what an earlier tuning has moved."""
    with torch.no_grad():
        for name, value in prepared.meta.get(_UNTUNED, {}).items():
            prepared.get_parameter(name).copy_(value)


def tune(
    prepared: GraphModule,
    linears: Sequence[QuantizedLinear],
    images: Values,
    wanted: Tensor,
    config: Tuning,
    seed: int,
    report: Callable[[int, float], None],
) -> tuple[float, float]:
    """Tunes a calibrated graph in place towards `wanted`, log-probabilities (images, classes).

    Returns the mean KL divergence over all images before and after. A model that got worse is put back.
    """
    vectors = [
        (name, parameter)
        for name, parameter in prepared.named_parameters()
        if parameter.ndim == 1 and not name.endswith(_OURS)
    ]
    prepared.meta[_UNTUNED] = {name: parameter.detach().clone() for name, parameter in vectors}
    groups = learnables(linears, Learning(epochs=config.epochs, scale_rate=config.rate, smooth_rate=config.rate))
    for _, parameter in vectors:
        parameter.requires_grad_(True)
        groups.append({"params": [parameter], "lr": config.rate * max(float(parameter.detach().abs().max()), 1e-3)})
    graph = fx.Graph()
    graph.output(graph.graph_copy(prepared.graph, {}))
    merged = finish_graph(merge_smoothing(fx.GraphModule(prepared, graph)))

    def divergence(batch: Tensor) -> Tensor:
        return F.kl_div(_run(merged, images, batch), wanted[batch], reduction="batchmean", log_target=True)

    before, after = descend(divergence, groups, _count(images), config, seed, report)
    for _, parameter in vectors:
        parameter.requires_grad_(False)
        parameter.grad = None
    finish(linears)
    return before, after
