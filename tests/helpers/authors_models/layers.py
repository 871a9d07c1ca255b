"""Layers that several repositories write alike."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Linear2d(nn.Linear):
    """A linear of (B, C, H, W) as a 1×1 convolution with a weight (N, C)."""

    def forward(self, x):
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class Mlp(nn.Module):
    def __init__(self, dim: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = linear(dim, 2 * dim), nn.GELU(), linear(2 * dim, dim), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """timm's stochastic depth, with its test of the mode."""

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.9)


class PatchMerging(nn.Module):
    """Swin's downsampling of (B, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * dim, 2 * dim, bias=False), nn.LayerNorm(4 * dim)

    def forward(self, x):
        parts = [x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class ChannelGate(nn.Module):
    """Squeeze-and-excite of (B, L, C) by the mean token, as LocalMamba's BiAttn."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.global_reduce, self.channel_select = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, x):
        gate = F.gelu(self.global_reduce(self.norm(x).mean(1, keepdim=True)))
        return x * torch.sigmoid(self.channel_select(gate))


def gates(name: str, calls: int) -> tuple[str, ...]:
    """Names of the products of a `ChannelGate`, which has a token for them: the mean, with an axis of its own."""
    numbers = ("", *(f"@{call}" for call in range(1, calls)))
    return tuple(f"{name}.{layer}{number}" for layer in ("global_reduce", "channel_select") for number in numbers)


class ScanWeights(nn.Module):
    """Parameters of K scans as VMamba stacks them; subclasses compute with them."""

    def __init__(self, inner: int, rank: int, states: int, scans: int) -> None:
        super().__init__()
        self.inner, self.rank, self.states, self.scans = inner, rank, states, scans
        self.x_proj_weight = nn.Parameter(torch.randn(scans, rank + 2 * states, inner) / math.sqrt(inner))
        self.dt_projs_weight = nn.Parameter(torch.randn(scans, inner, rank) / math.sqrt(rank))
        self.dt_projs_bias = nn.Parameter(torch.randn(scans, inner) - 2)
        self.A_logs = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(scans * inner, 1))
        self.Ds = nn.Parameter(torch.ones(scans * inner))

    def project(self, xs: Tensor) -> tuple[Tensor, ...]:
        """Splits products of (B, K, E, L) with einsum, and puts the inputs of the scan together."""
        B, K, _, L = xs.shape
        x_dbl = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
        dts, Bs, Cs = torch.split(x_dbl, [self.rank, self.states, self.states], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_projs_weight)
        As = -torch.exp(self.A_logs.float())
        return (
            xs.float().view(B, -1, L),
            dts.contiguous().float().view(B, -1, L),
            As,
            Bs.float().view(B, K, -1, L),
            Cs.float().view(B, K, -1, L),
            self.Ds.float().view(-1),
            self.dt_projs_bias.float().view(-1),
        )
