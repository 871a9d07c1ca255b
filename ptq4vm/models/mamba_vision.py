"""MambaVision (Hatamizadeh and Kautz 2025): convolutions on large maps, then Mamba mixers and attention in windows.

Parameters have the names of the public checkpoints (NVlabs/MambaVision), which load strictly.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ptq4vm.models.hierarchical import FeatureMaps
from ptq4vm.models.mamba_vision_blocks import (
    Attention,
    Block,
    ConvBlock,
    Downsample,
    Level,
    MambaVisionMixer,
    PatchEmbed,
)
from ptq4vm.models.registry import register


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
