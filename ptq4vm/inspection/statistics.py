"""What is gathered of tensors batch by batch, in memory that does not grow with the number of images.

Shapes: B images, L tokens, D channels; G groups of neighbouring tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

PERCENTILES = (0, 1, 25, 50, 75, 99, 100)
"""0 and 100 are the smallest and the largest value."""

FINEST = 128
"""Tokens, or channels, that a surface or a band tells apart: a figure has no room for more."""

BINS = 512

QUANTIZED = "after quantization"
"""What figures call the values of codes; `s` in other names is the smoothing."""


@dataclass(slots=True)
class Fidelity:
    """How close tensors came to those they stand for."""

    signal: float = 0.0
    """Σ x² of the exact ones; `other` is that of the approximate ones."""
    other: float = 0.0
    product: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, approximate: Tensor) -> None:
        x, y = exact.float(), approximate.float()
        self.signal += _total(x.square())
        self.other += _total(y.square())
        self.product += _total(x * y)
        self.noise += _total((x - y).square())
        if not math.isfinite(self.signal + self.other + self.noise):
            raise ValueError("values of which no signal to noise ratio can be told: their squares are not finite")

    @property
    def sqnr(self) -> float | None:
        """Signal to quantization noise in dB; None where one of the two is zero."""
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise > 0 else None

    @property
    def cosine(self) -> float | None:
        size = math.sqrt(self.signal * self.other)
        return self.product / size if size > 0 else None


def _total(x: Tensor) -> float:
    return float(x.sum(dtype=torch.float64))


class Histogram:
    """Values of x (B, L, D) by group of tokens, in bins around zero that widen as values grow.

    Widths are powers of two and wider bins are sums of narrower ones, so the counts do not depend on how values come
    in batches.
    """

    def __init__(self, tokens: int) -> None:
        groups = min(tokens, FINEST)
        self.group = torch.arange(tokens) * groups // tokens
        self.width = 2.0**-40
        self.counts = torch.zeros(groups, BINS, dtype=torch.int32)
        self.low, self.high = torch.full((groups,), math.inf), torch.full((groups,), -math.inf)

    def add(self, x: Tensor) -> None:
        x = x.float()
        while self.width * (BINS // 2) <= float(x.abs().max()):
            self._widen()
        places = (x / self.width).floor().long() + BINS // 2 + BINS * self.group.to(x.device).unsqueeze(-1)
        counts = torch.bincount(places.flatten(), minlength=self.counts.numel())
        self.counts += counts.view_as(self.counts).to("cpu", torch.int32)
        self.low.scatter_reduce_(0, self.group, x.amin((0, 2)).cpu(), "amin")
        self.high.scatter_reduce_(0, self.group, x.amax((0, 2)).cpu(), "amax")

    def _widen(self) -> None:
        pairs = self.counts.unflatten(1, (-1, 2)).sum(-1, dtype=torch.int32)
        self.counts = torch.zeros_like(self.counts)
        self.counts[:, BINS // 4 : 3 * BINS // 4] = pairs
        self.width *= 2

    def percentiles(self) -> Tensor:
        """`PERCENTILES` (7, G), exact at both ends and within half a bin between them."""
        below = self.counts.cumsum(1)
        bins = torch.stack([(below < share / 100 * below[:, -1:]).sum(1) for share in PERCENTILES])
        values = ((bins + 0.5 - BINS // 2) * self.width).clamp(self.low, self.high)
        values[0], values[-1] = self.low, self.high
        return values


class Activation:
    """The input x (B, L, D) of one linear; of a quantized one also what its codes stand for."""

    def __init__(self, tokens: int, channels: int) -> None:
        self.tokens, self.channels = tokens, channels
        self.images = 0
        self.inv_smooth: Tensor | None = None
        self.sizes = torch.zeros(tokens, channels)
        """Σ |x| over images; `quantized_sizes` is that of the dequantized codes."""
        self.quantized_sizes: Tensor | None = None
        self.squares = 0.0
        self.peaks = torch.zeros(tokens)
        """Σ max|x| of the token over images."""
        self.token_max, self.channel_max = torch.zeros(tokens), torch.zeros(channels)
        self.values = Histogram(tokens)
        """Of x · inv_smooth, which is quantized."""
        self.quantized_values: Histogram | None = None

    def add(self, x: Tensor, inv_smooth: Tensor | None = None, dequantized: Tensor | None = None) -> None:
        x = x.float()
        size = x.abs()
        highest = size.amax(-1).cpu()
        self.images += len(x)
        self.sizes += size.sum(0).cpu()
        self.squares += _total(x.square())
        self.peaks += highest.sum(0)
        self.token_max = torch.maximum(self.token_max, highest.amax(0))
        self.channel_max = torch.maximum(self.channel_max, size.amax((0, 1)).cpu())
        self.values.add(x if inv_smooth is None else x * inv_smooth)
        self.inv_smooth = None if inv_smooth is None else inv_smooth.cpu()
        if dequantized is not None:
            if self.quantized_sizes is None or self.quantized_values is None:
                self.quantized_sizes, self.quantized_values = torch.zeros_like(self.sizes), Histogram(self.tokens)
            self.quantized_sizes += dequantized.abs().sum(0).cpu()
            self.quantized_values.add(dequantized)

    @property
    def peak(self) -> float:
        """max|x| over the root mean square: what one range for all values costs."""
        mean = self.squares / max(1, self.images * self.sizes.numel())
        return float(self.channel_max.max()) / math.sqrt(max(mean, torch.finfo(torch.float32).tiny))

    @property
    def token_variance(self) -> float:
        """As `ptq4vm.inspection.phenomena.Phenomena` has it."""
        return float(self.peaks.max() / self.peaks.min().clamp(min=torch.finfo(torch.float32).tiny))

    @property
    def channel_outliers(self) -> float:
        return float(self.channel_max.max() / self.channel_max.median().clamp(min=torch.finfo(torch.float32).tiny))

    def surfaces(self) -> dict[str, Tensor]:
        """Means over images (tokens, channels); a cell that stands for several of them has their highest."""
        sizes = {"|x|": self.sizes}
        if self.inv_smooth is not None:
            sizes["|x / s|"] = self.sizes * self.inv_smooth
        if self.quantized_sizes is not None:
            sizes[QUANTIZED] = self.quantized_sizes
        shape = min(self.tokens, FINEST), min(self.channels, FINEST)
        return {name: adaptive_max_pool2d(size[None] / self.images, shape)[0] for name, size in sizes.items()}

    def token_lines(self) -> dict[str, Tensor]:
        return {"max|x|": self.token_max, "mean|x|": self.sizes.mean(1) / self.images}

    def channel_lines(self) -> dict[str, Tensor]:
        lines = {"max|x|": self.channel_max, "mean|x|": self.sizes.mean(0) / self.images}
        return lines if self.inv_smooth is None else lines | {"max|x / s|": self.channel_max * self.inv_smooth}

    def bands(self) -> dict[str, Tensor]:
        """`PERCENTILES` (7, G) over images and channels, before and after quantization."""
        name = "x" if self.inv_smooth is None else "x / s"
        bands = {name: self.values.percentiles()}
        return bands if self.quantized_values is None else bands | {QUANTIZED: self.quantized_values.percentiles()}
