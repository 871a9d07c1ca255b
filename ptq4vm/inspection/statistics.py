"""Statistics of tensors, accumulated batch by batch in memory that does not grow with the number of images.

Shapes: B images, L tokens, D channels; G groups of neighbouring tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

PERCENTILES = (0, 1, 25, 50, 75, 99, 100)
"""Percentiles in figures; 0 and 100 are the smallest and the largest value."""

FINEST = 128
"""Largest number of tokens, or channels, in a surface or a band: a figure has no room for more."""

BINS = 512

QUANTIZED = "after quantization"
"""Name of the dequantized values in figures; `s` in other names is the smoothing."""


@dataclass(slots=True)
class Fidelity:
    """Similarity of approximate tensors y to exact ones x."""

    signal: float = 0.0
    """Σ x²"""
    other: float = 0.0
    """Σ y²"""
    product: float = 0.0
    """Σ x·y"""
    noise: float = 0.0
    """Σ (x − y)²"""

    def add(self, exact: Tensor, approximate: Tensor) -> None:
        """Adds a pair of tensors; raises ValueError if their squares are not finite."""
        x, y = exact.float(), approximate.float()
        self.signal += _total(x.square())
        self.other += _total(y.square())
        self.product += _total(x * y)
        self.noise += _total((x - y).square())
        if not math.isfinite(self.signal + self.other + self.noise):
            raise ValueError("these values have no signal to noise ratio: their squares are not finite")

    @property
    def sqnr(self) -> float | None:
        """Signal to quantization noise ratio in dB; None where signal or noise is zero."""
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise > 0 else None

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between both; None where one is zero."""
        size = math.sqrt(self.signal * self.other)
        return self.product / size if size > 0 else None


def _total(x: Tensor) -> float:
    return float(x.sum(dtype=torch.float64))


class Histogram:
    """Counts of the values of x (B, L, D) by group of tokens, in bins around zero that widen as values grow.

    Widths are powers of two and wider bins are sums of narrower ones, so the counts do not depend on the division into
    batches.
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
        """Returns `PERCENTILES` (7, G), exact at both ends and within half a bin between them."""
        below = self.counts.cumsum(1)
        bins = torch.stack([(below < share / 100 * below[:, -1:]).sum(1) for share in PERCENTILES])
        values = ((bins + 0.5 - BINS // 2) * self.width).clamp(self.low, self.high)
        values[0], values[-1] = self.low, self.high
        return values


class Activation:
    """Statistics of the input x (B, L, D) of one linear, and of the dequantized codes if the linear is quantized."""

    def __init__(self, tokens: int, channels: int) -> None:
        self.tokens, self.channels = tokens, channels
        self.images = 0
        self.inv_smooth: Tensor | None = None
        self.sizes = torch.zeros(tokens, channels)
        """Σ |x| over images."""
        self.quantized_sizes: Tensor | None = None
        """Σ |x| over images, of the dequantized codes."""
        self.squares = 0.0
        self.peaks = torch.zeros(tokens)
        """Σ over images of the token's max|x|."""
        self.token_max, self.channel_max = torch.zeros(tokens), torch.zeros(channels)
        self.values = Histogram(tokens)
        """Values of x · inv_smooth, which is quantized."""
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
        """max|x| over the root mean square: the cost of one range for all values."""
        mean = self.squares / max(1, self.images * self.sizes.numel())
        return float(self.channel_max.max()) / math.sqrt(max(mean, torch.finfo(torch.float32).tiny))

    @property
    def token_variance(self) -> float:
        """Token variance as defined in `ptq4vm.inspection.phenomena.Phenomena`."""
        return float(self.peaks.max() / self.peaks.min().clamp(min=torch.finfo(torch.float32).tiny))

    @property
    def channel_outliers(self) -> float:
        """Channel outliers as defined in `ptq4vm.inspection.phenomena.Phenomena`."""
        return float(self.channel_max.max() / self.channel_max.median().clamp(min=torch.finfo(torch.float32).tiny))

    def surfaces(self) -> dict[str, Tensor]:
        """Returns means over images (tokens, channels); a cell that stands for several has the highest of them."""
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
        """Returns `PERCENTILES` (7, G) over images and channels, before and after quantization."""
        name = "x" if self.inv_smooth is None else "x / s"
        bands = {name: self.values.percentiles()}
        return bands if self.quantized_values is None else bands | {QUANTIZED: self.quantized_values.percentiles()}
