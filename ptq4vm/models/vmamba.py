"""VMamba (Liu et al. 2024), the "v05_noz" models that were released: four directions, no gate, an MLP in every block.

Parameters have the names of the public checkpoints (MzeroMiko/VMamba), which load strictly.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ptq4vm.models.hierarchical import SS2D, FeatureMaps, HierarchicalMamba, to_channels_first, to_channels_last
from ptq4vm.models.registry import register
from ptq4vm.models.scan_order import COLUMNS, COLUMNS_FLIP, ROWS, ROWS_FLIP

CROSS_SCAN = (ROWS, COLUMNS, ROWS_FLIP, COLUMNS_FLIP)


class VMamba(HierarchicalMamba):
    """VMamba classifier: (B, C, H, W) images → (B, num_classes) logits.

    Args:
        in_chans: C.
        num_classes: 0 leaves the classifier out.
        embed_dim: channels of the first stage; each later stage has twice as many.
        depths: blocks of every stage.
        ssm_ratio: inner channels of a block per channel.
        state: states of a channel.
        mlp_ratio: hidden channels of a block's MLP per channel; 0 leaves the MLP out.
        drop_path_rate: of the last block; it grows linearly from 0.

    Example:
        >>> import torch
        >>> model = VMamba(num_classes=10, embed_dim=16, depths=(1, 1))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        ssm_ratio: float = 1.0,
        state: int = 1,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        half = embed_dim // 2
        stem = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, stride=2, padding=1),
            to_channels_last(),
            nn.LayerNorm(half),
            to_channels_first(),
            nn.GELU(),
            nn.Conv2d(half, embed_dim, 3, stride=2, padding=1),
            to_channels_last(),
            nn.LayerNorm(embed_dim),
        )
        super().__init__(
            stem,
            embed_dim,
            depths,
            lambda _, dim: SS2D(dim, int(ssm_ratio * dim), state, CROSS_SCAN),
            _downsample,
            num_classes,
            mlp_ratio,
            drop_path_rate,
        )


def _downsample(dim: int) -> nn.Module:
    return nn.Sequential(
        to_channels_first(), nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1), to_channels_last(), nn.LayerNorm(2 * dim)
    )


SIZES: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s1l8": {"embed_dim": 96, "depths": (2, 2, 8, 2), "ssm_ratio": 1.0},
    "vmamba_tiny_s2l5": {"embed_dim": 96, "depths": (2, 2, 5, 2), "ssm_ratio": 2.0},
    "vmamba_small_s2l15": {"embed_dim": 96, "depths": (2, 2, 15, 2), "ssm_ratio": 2.0},
    "vmamba_small_s1l20": {"embed_dim": 96, "depths": (2, 2, 20, 2), "ssm_ratio": 1.0},
    "vmamba_base_s2l15": {"embed_dim": 128, "depths": (2, 2, 15, 2), "ssm_ratio": 2.0},
    "vmamba_base_s1l20": {"embed_dim": 128, "depths": (2, 2, 20, 2), "ssm_ratio": 1.0},
    # maps of 8², 4², 2² tokens, for 32×32 images
    "vmamba_nano_32": {"num_classes": 10, "embed_dim": 24, "depths": (1, 1, 2)},
    "vmamba_micro_32": {"num_classes": 10, "embed_dim": 48, "depths": (1, 2, 2)},
}
BUNDLED = {"vmamba_nano_32": ("digits",), "vmamba_micro_32": ("cifar10",)}

register(VMamba, SIZES, BUNDLED, FeatureMaps, first_conv="patch_embed.0", classifier="classifier.head")
