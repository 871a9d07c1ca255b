"""The diagonal of a Fisher matrix: how much a model's output depends on each entry that its blocks hand on.

A small change Δ of a block's output changes the predicted distribution by a KL divergence of ½ E[(gᵀΔ)²], where g is
the gradient of the logits along a random direction of their own Fisher matrix diag(p) - p pᵀ. BRECQ (Li et al. 2021)
has the labels' gradient in its place; here nothing needs a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptq4vm.graph.partition import Block, NamedTensors

BATCH = 8
"""Images whose activations in all blocks are held at once."""

PROBES = 4
"""Random directions for each image."""

FLOOR = 0.1
"""Added to every entry, as a share of the mean: one that does not matter for these images may for others."""


def fisher_diagonal(
    blocks: Sequence[Block], images: NamedTensors, seed: int, report: Callable[[int, int], None]
) -> list[NamedTensors]:
    """Returns for every block the diagonal (…) for the entries of its outputs (images, …), with mean 1 + `FLOOR`.

    `blocks` compute in floating point; `report(batch, batches)` is called after every batch. Outputs on which no
    floating-point output of the model depends are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: list[NamedTensors] = [{} for _ in blocks]
    batches = torch.arange(len(next(iter(images.values())))).split(BATCH)
    for number, batch in enumerate(batches, 1):
        found = _outputs(blocks, {name: value[batch] for name, value in images.items()})
        keys = [(i, name) for i, block in enumerate(blocks) for name in block.outputs if found[i][name].requires_grad]
        results = [found[i][name] for i, block in enumerate(blocks) for name in block.results]
        results = [value for value in results if value.requires_grad]
        for _ in range(PROBES if results else 0):
            score = torch.stack([_score(value, generator) for value in results]).sum()
            grads = torch.autograd.grad(
                score, [found[i][name] for i, name in keys], retain_graph=True, allow_unused=True
            )
            for (i, name), grad in zip(keys, grads, strict=True):
                if grad is not None:
                    sums[i][name] = sums[i].get(name, torch.zeros(())) + grad.square().sum(0)
        report(number, len(batches))
    return [{name: value / value.mean().clamp(min=1e-30) + FLOOR for name, value in total.items()} for total in sums]


def _outputs(blocks: Sequence[Block], values: NamedTensors) -> list[NamedTensors]:
    """Runs every block, with the autograd graph of all that follows the first values that blocks hand on."""
    found: list[NamedTensors] = []
    for block in blocks:
        outputs = block(values)
        for value in outputs.values():
            if value.is_floating_point() and not value.requires_grad:
                value.requires_grad_(True)
        values = values | outputs
        found.append(outputs)
    return found


def _score(output: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the output along a random direction; for logits (images, classes) it is one of their Fisher matrix."""
    direction = torch.randn(output.shape, generator=generator).to(output)
    if output.dim() == 2:
        p = output.detach().softmax(1)
        direction = p.sqrt() * direction - p * (p.sqrt() * direction).sum(1, keepdim=True)
    return (output * direction).sum()
