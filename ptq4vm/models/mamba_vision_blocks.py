"""Blocks of MambaVision: convolutions on maps, then Mamba mixers and attention in windows.

Shapes: B images, H×W maps, C channels of a level, N windows of an image, L = side² tokens of a window. Convolutions see
maps (B, C, H, W), the other blocks windows (B, N, L, C).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from ptq4vm.models.scan_order import initial_states, scan_tokens


def to_windows(x: Tensor, side: int) -> Tensor:
    """Cuts maps into windows, zeros at the bottom and right of the last ones: (B, C, H, W) → (B, N, L, C)."""
    x = F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side))
    tiles = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, side: int, height: int, width: int) -> Tensor:
    """Undoes `to_windows` and drops the padding: (B, N, L, C) → (B, C, H, W)."""
    tiles = x.unflatten(2, (side, side)).unflatten(1, (math.ceil(height / side), -1))
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


class MambaVisionMixer(nn.Module):
    """Scan of half of the channels beside the other half, both behind a convolution: (B, N, L, C) → (B, N, L, C).

    The convolutions are centred on a token where Mamba's see the past alone.
    """

    def __init__(self, dim: int, state: int = 8, taps: int = 3) -> None:
        super().__init__()
        half, rank = dim // 2, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * half, bias=False)
        self.x_proj = nn.Linear(half, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, half)
        self.A_log = nn.Parameter(initial_states(half, state))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(2 * half, dim, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, taps, groups=half, padding="same", bias=False)
        self.conv1d_z = nn.Conv1d(half, half, taps, groups=half, padding="same", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.shape[1]
        x, z = self.in_proj(x.flatten(0, 1)).chunk(2, dim=-1)
        x, z = _neighbours(x, self.conv1d_x.weight), _neighbours(z, self.conv1d_z.weight)
        bias = 2 * self.dt_proj.bias  # the official code adds it in dt_proj and again in the scan
        y = scan_tokens(x, None, self.x_proj.weight, self.dt_proj.weight, bias, self.A_log, self.D)
        return self.out_proj(torch.cat((y, z), dim=-1)).unflatten(0, (-1, windows))


def _neighbours(x: Tensor, weight: Tensor) -> Tensor:
    """Applies a depth-wise convolution, zeros around the window, and SiLU: x (B, L, C), weight (C, 1, odd taps).

    It is written as the convolution of a map of one row, which fuses with the scan as VMamba's convolutions do.
    """
    row = x.unsqueeze(1).permute(0, 3, 1, 2)
    y = F.conv2d(row, weight.unsqueeze(2), padding=(0, weight.shape[2] // 2), groups=len(weight))
    return F.silu(y).permute(0, 2, 3, 1).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention among the tokens of a window: (B, N, L, C) → (B, N, L, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.shape[1]
        q, k, v = self.qkv(x.flatten(0, 1)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(y).unflatten(0, (-1, windows))


class Block(nn.Module):
    """Pre-norm residual block of windows: a mixer or attention, then an MLP, each with a scale if given."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1, self.gamma_2 = (
            None if scale is None else nn.Parameter(torch.full((dim,), scale)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(_scaled(self.mixer(self.norm1(x)), self.gamma_1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma_2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class ConvBlock(nn.Module):
    """Residual block of two 3×3 convolutions: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.norm1(self.conv1(x)), approximate="tanh")
        return x + self.drop_path(self.norm2(self.conv2(hidden)))


class Level(nn.Module):
    """Blocks on maps of one size, in windows if a `side` is given; `downsample` halves the maps for the next level."""

    def __init__(self, blocks: Sequence[nn.Module], side: int | None, downsample: nn.Module) -> None:
        super().__init__()
        self.side = side
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = x if self.side is None else to_windows(x, self.side)
        for block in self.blocks:
            x = block(x)
        return x if self.side is None else from_windows(x, self.side, height, width)


class Downsample(nn.Module):
    """Convolution with stride 2: (B, C, H, W) → (B, 2C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x)


class PatchEmbed(nn.Module):
    """Two convolutions with stride 2: images (B, C, H, W) → maps (B, dim, H / 4, W / 4)."""

    def __init__(self, in_chans: int, inner: int, dim: int) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_chans, inner, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(inner, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(inner, dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(dim, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_down(x)
