"""MambaVision (Hatamizadeh and Kautz 2025): convolutions on large maps, then Mamba mixers and attention in windows.

Parameters have the names of the public checkpoints (NVlabs/MambaVision), which load strictly.

Shapes: B images, H×W maps, C channels of a level, N windows of an image, L = side² tokens of a window. Convolutions see
maps (B, C, H, W), the other blocks windows (B, N, L, C).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from ptq4vm.models.hierarchical import FeatureMaps
from ptq4vm.models.registry import register
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


class MambaVision(nn.Module):
    """MambaVision classifier: (B, C, H, W) images → (B, num_classes) logits.

    Args:
        in_chans: C.
        num_classes: 0 leaves the classifier out.
        embed_dim: channels of the first level; each later level has twice as many.
        stem_dim: channels between the two convolutions of the stem.
        depths: blocks of every level. The first two levels are of convolutions; in the others attention takes the place
            of the scan in the second half of the blocks, the smaller one.
        heads: attention heads of every level.
        windows: side of the windows of every level; the first two have none.
        mlp_ratio: hidden channels of a block's MLP per channel.
        layer_scale: initial scale of a block's branches; None leaves the scales out.
        drop_path_rate: of the last block; it grows linearly from 0.

    Raises:
        ValueError: `depths`, `heads` and `windows` are of different lengths.

    Example:
        >>> import torch
        >>> model = MambaVision(num_classes=10, embed_dim=8, stem_dim=8, depths=(1, 1, 2, 2), heads=(1, 1, 2, 2))
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 80,
        stem_dim: int = 32,
        depths: Sequence[int] = (1, 3, 8, 4),
        heads: Sequence[int] = (2, 4, 8, 16),
        windows: Sequence[int] = (8, 8, 14, 7),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(heads) == len(windows):
            raise ValueError(f"depths={tuple(depths)}, heads={tuple(heads)}, windows={tuple(windows)}: one a level")
        channels = [embed_dim * 2**i for i in range(len(depths))]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = channels[-1]
        self.patch_embed = PatchEmbed(in_chans, stem_dim, embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        levels = []
        for i, (dim, depth) in enumerate(zip(channels, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                if i < 2:
                    blocks.append(ConvBlock(dim, next(rates)))
                else:
                    mixer = Attention(dim, heads[i]) if j >= (depth + 1) // 2 else MambaVisionMixer(dim)
                    blocks.append(Block(dim, mixer, mlp_ratio, next(rates), layer_scale))
            last = i == len(depths) - 1
            levels.append(Level(blocks, windows[i] if i >= 2 else None, nn.Identity() if last else Downsample(dim)))
        self.levels = nn.ModuleList(levels)
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(channels)
        ]
        self.apply(_initialize)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".D"))}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the map of the last level, normalized: (B, C, H, W)."""
        x = self.patch_embed(x)
        level: Any
        for level in self.levels:
            x = level.downsample(level(x))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class MambaVisionMaps(FeatureMaps):
    """Backbone for detection or segmentation, with the norms of the official detectors: `features_only=True`."""

    stages_name = "levels"

    @staticmethod
    def checkpoint_filter(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(state)

    def normalized(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _initialize(module: nn.Module) -> None:
    """Initializes a linear as the official training code does."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_LARGE: dict[str, Any] = {"embed_dim": 196, "stem_dim": 64, "heads": (4, 8, 16, 32), "layer_scale": 1e-5}

SIZES: dict[str, dict[str, Any]] = {
    "mamba_vision_T": {},
    "mamba_vision_T2": {"depths": (1, 3, 11, 4)},
    "mamba_vision_S": {"embed_dim": 96, "stem_dim": 64, "depths": (3, 3, 7, 5)},
    "mamba_vision_B": {"embed_dim": 128, "stem_dim": 64, "depths": (3, 3, 10, 5), "layer_scale": 1e-5},
    "mamba_vision_L": {**_LARGE, "depths": (3, 3, 10, 5)},
    "mamba_vision_L2": {**_LARGE, "depths": (3, 3, 12, 5)},
}
PREPROCESSING = {name: {"crop_pct": 1.0} for name in SIZES} | {
    "mamba_vision_T2": {"crop_pct": 0.98},
    "mamba_vision_S": {"crop_pct": 0.93},
}

register(
    MambaVision,
    SIZES,
    {},
    MambaVisionMaps,
    preprocessing=PREPROCESSING,
    first_conv="patch_embed.conv_down.0",
    classifier="head",
)
