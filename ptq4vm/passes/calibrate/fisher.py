"""How much a model's output depends on each entry of what its blocks hand on: the diagonal of a Fisher matrix.

A small change Δ of a block's output changes the predicted distribution by a KL divergence of ½ E[(gᵀΔ)²], where g is
the gradient of the logits along a random direction of their own Fisher matrix diag(p) - p pᵀ. BRECQ (Li et al. 2021)
has the labels' gradient in its place; here nothing needs a label.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ptq4vm.graph.partition import Part
from ptq4vm.passes.calibrate.jlss import Values

BATCH = 8
"""Images whose activations in all blocks are held at once."""

PROBES = 4
"""Random directions an image."""

FLOOR = 0.1
"""Added to every importance, as a share of the mean: what does not matter for these images may for others."""


def importance(parts: Sequence[Part], images: Values, seed: int, progress: bool) -> list[Values]:
    """For every part the importance (…) of the entries of its outputs (images, …), with mean 1 + `FLOOR`.

    `parts` compute in floating point. What no floating-point output of the model depends on is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: list[Values] = [{} for _ in parts]
    batches = torch.arange(len(next(iter(images.values())))).split(BATCH)
    for batch in tqdm(batches, desc="importance", unit="batch", disable=not progress):
        found = _outputs(parts, {name: value[batch] for name, value in images.items()})
        keys = [(i, name) for i, part in enumerate(parts) for name in part.outputs if found[i][name].requires_grad]
        results = [found[i][name] for i, part in enumerate(parts) for name in part.results]
        results = [value for value in results if value.requires_grad]
        for _ in range(PROBES if results else 0):
            score = torch.stack([_score(value, generator) for value in results]).sum()
            grads = torch.autograd.grad(
                score, [found[i][name] for i, name in keys], retain_graph=True, allow_unused=True
            )
            for (i, name), grad in zip(keys, grads, strict=True):
                if grad is not None:
                    sums[i][name] = sums[i].get(name, torch.zeros(())) + grad.square().sum(0)
    return [{name: value / value.mean().clamp(min=1e-30) + FLOOR for name, value in total.items()} for total in sums]


def _outputs(parts: Sequence[Part], values: Values) -> list[Values]:
    """Of every part, with the graph of all that follows the first values that parts hand on."""
    found: list[Values] = []
    for part in parts:
        outputs = part(values)
        for value in outputs.values():
            if value.is_floating_point() and not value.requires_grad:
                value.requires_grad_(True)
        values = values | outputs
        found.append(outputs)
    return found


def _score(output: Tensor, generator: torch.Generator) -> Tensor:
    """The output along a random direction; that of logits (images, classes) is one of their softmax's Fisher matrix."""
    direction = torch.randn(output.shape, generator=generator).to(output)
    if output.dim() == 2:
        p = output.detach().softmax(1)
        direction = p.sqrt() * direction - p * (p.sqrt() * direction).sum(1, keepdim=True)
    return (output * direction).sum()
