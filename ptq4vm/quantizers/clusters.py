"""k-scaled quantization: K scales for tokens or channels of like magnitude (k-scaled paper).

Shapes: x (images, …) with one axis of J tokens or channels; indices and scales are (J,). The scales are looked up once,
so at run time there is one table and no index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vm.ops import quantization
from ptq4vm.quantization_specs import IntegerRange, RangeSearch

ROUNDS = 100
"""Rounds of Lloyd's algorithm, at most; in one dimension it stops after a few."""


class Statistics:
    """Sums, maxima and samples of a value x (images, …) over all images, for J tokens or channels on one axis."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.size = self.largest = torch.zeros(())
        """Σ x, Σ |x| and max |x|, (J,) each."""
        self.samples: list[Tensor] = []

    @classmethod
    def of(cls, x: Tensor, axis: int) -> Statistics:
        (statistics := cls()).add(x, axis)
        return statistics

    def add(self, x: Tensor, axis: int) -> None:
        rows = x.float().transpose(0, axis).flatten(1)
        sizes = rows.abs()
        self.sum = self.sum + rows.sum(1, dtype=torch.float64)
        self.size = self.size + sizes.sum(1, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, sizes.amax(1))
        self.count += rows.shape[1]
        if sum(sample.numel() for sample in self.samples) < KEPT:
            self.samples.append(rows)

    def scale(self, spec: IntegerRange, search: RangeSearch) -> Tensor:
        """Returns one scale (1,) for all of x."""
        values = torch.cat([sample.flatten() for sample in self.samples])
        return symmetric_scale(values.unsqueeze(0), self.largest.amax(0, keepdim=True), spec, search)

    def clustered_scale(self, clusters: int, spec: IntegerRange, search: RangeSearch, power_of_two: bool) -> Tensor:
        """Returns the scale (J,), of whose entries at most `clusters` differ.

        Tokens or channels are clustered by mean|x|. A cluster's scale is max|x| / 127.5, or the truncation of it with
        the least squared error. With `power_of_two` it is the first cluster's times a power of two: the one above or
        the one below, whichever errs less (the paper takes the nearer one).
        """
        rows = torch.cat(self.samples, 1)
        index = cluster(self.size / self.count, clusters)
        scales: list[Tensor] = []
        for k in index.unique():
            values, largest = rows[index == k].reshape(1, -1), self.largest[index == k].amax(0, keepdim=True)
            scale = symmetric_scale(values, largest, spec, search)
            if power_of_two and scales:
                exponent = torch.log2(scale / scales[0])
                around = torch.exp2(torch.stack((exponent.floor(), exponent.ceil()), 1))
                scale = least_error(values, scales[0] * around, spec)
            scales.append(scale)
        return torch.cat(scales)[index]


KEPT = 2**24
"""Values of one tensor that are kept to score truncations: the first images'. Maxima and means are those of all."""


def cluster(magnitudes: Tensor, clusters: int) -> Tensor:
    """Returns which of at most K clusters each magnitude (J,) is in: k-means from quantiles, clusters in order of size.

    No cluster is empty: the numbers are 0, 1, … without gaps.
    """
    values = magnitudes.double()
    centers = torch.quantile(values, (torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters).unique()
    for _ in range(ROUNDS):
        index = (values.unsqueeze(1) - centers).abs().argmin(1)
        moved = torch.stack([values[index == k].mean() for k in index.unique()])
        if torch.equal(moved, centers):
            break
        centers = moved
    return (values.unsqueeze(1) - centers).abs().argmin(1).unique(return_inverse=True)[1]


FRACTIONS = torch.arange(100, 9, -2) / 100
"""Candidate scales, as fractions of the one that reaches max|x|."""

SAMPLES, LARGEST_SAMPLE = 2**19, 2**15
"""Values that are scored, of all rows and of one; of more, some are drawn. The full range is that of all."""


def symmetric_scale(values: Tensor, largest: Tensor, spec: IntegerRange, search: RangeSearch) -> Tensor:
    """Returns the scale (rows,) of rows of values (rows, n): max|x| / (2^(b-1) - 1/2), or less where that errs less.

    `largest` (rows,) are the maxima, which may be those of more values.
    """
    low, high = spec.bounds
    full = (largest / ((high - low) / 2)).clamp(min=quantization.EPSILON)
    if search is RangeSearch.MINMAX:
        return full
    return least_error(values, (full.unsqueeze(1) * FRACTIONS.to(full.device)).clamp(min=quantization.EPSILON), spec)


def least_error(values: Tensor, candidates: Tensor, spec: IntegerRange) -> Tensor:
    """Returns those (rows,) of the candidate scales (rows, m) with the least squared error on values (rows, n)."""
    wanted = min(LARGEST_SAMPLE, max(1, SAMPLES // len(values)))
    if values.shape[1] > wanted:
        # drawn, since every n-th value may always be the same channel's
        chosen = torch.randint(values.shape[1], (wanted,), generator=torch.Generator().manual_seed(0))
        values = values[:, chosen.to(values.device)]
    errors = torch.stack([_error(values.float(), scale, *spec.bounds) for scale in candidates.unbind(1)], 1)
    return candidates.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)


def _error(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    scale = scale.unsqueeze(1)
    return (torch.round(values * (1.0 / scale)).clamp(low, high) * scale - values).square().sum(1)
