"""LocalVMamba (Huang et al. 2024): VMamba's stages with gated blocks and four scan directions each, found by search.

Parameters have the names of the public checkpoints (hunto/LocalMamba), which load strictly.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ptq4vm.models.hierarchical import SS2D, FeatureMaps, HierarchicalMamba, to_channels_last
from ptq4vm.models.registry import register
from ptq4vm.models.scan_order import ChannelGate, Direction, direction_table, transpose_map

TINY = direction_table(
    """
    h h_flip w7 w7_flip | h_flip v_flip w2 w2_flip | h_flip v_flip w2_flip w7 | h_flip v v_flip w2
    h h_flip v_flip w2_flip | h_flip v_flip w2 w2_flip | h w2_flip w7 w7_flip | h h_flip v v_flip
    h v_flip w7 w7_flip | h_flip v w2 w7_flip | v v_flip w2 w7_flip | h h_flip v_flip w2_flip
    v_flip w2_flip w7 w7_flip | h_flip v_flip w2_flip w7_flip | h_flip v w7 w7_flip
    """
)
SMALL = direction_table(
    """
    h v v_flip w7_flip | h h_flip v w7 | h_flip v v_flip w7 | h_flip v w2_flip w7
    h_flip v w2_flip w7 | h_flip v_flip w2 w7_flip | h_flip v v_flip w7 | h v v_flip w7
    h v v_flip w7 | h v v_flip w7_flip | h h_flip v v_flip | h v v_flip w2
    v v_flip w2_flip w7 | h h_flip v w2 | h_flip v v_flip w7_flip | h h_flip v v_flip
    h v v_flip w7_flip | h v v_flip w7_flip | h h_flip v_flip w7 | h_flip v_flip w2_flip w7
    h_flip v v_flip w7_flip | v v_flip w7 w7_flip | h v v_flip w7_flip | h_flip v v_flip w2
    h v v_flip w2_flip | h h_flip v w7 | h h_flip w7 w7_flip | h v_flip w2 w2_flip
    h v_flip w2 w7 | h v v_flip w7_flip | h_flip v w2_flip w7 | h_flip v_flip w7 w7_flip
    h v w7 w7_flip
    """
)
"""Directions of every block, as the published searches found them."""

NANO = (
    ("h", "h_flip", "w2", "w2_flip"),
    ("v", "v_flip", "w2", "w3_flip"),
    ("h", "v_flip", "w2", "w2_flip"),
    ("h_flip", "v", "w2", "w2_flip"),
)
MICRO = (*NANO, NANO[0])


class LocalSS2D(SS2D):
    """SS2D gated by the second half of in_proj's output; every direction goes through the block's channel gate."""

    def __init__(self, dim: int, inner: int, state: int, directions: Sequence[str]) -> None:
        super().__init__(dim, inner, state, [Direction.parse(name) for name in directions], gated=True)
        self.multi_scan = nn.ModuleDict({"attn": ChannelGate(inner)})

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.out_norm(self.scan(x)) * F.silu(z))

    def branch(self, k: int, tokens: Tensor, height: int, width: int) -> Tensor:
        """Scans with zeros at the end, so that all sequences of a block are as long as its longest.

        The official code does so. No result changes, since a scan is causal; the linears see more tokens.
        """
        direction = self.directions[k]
        own = direction.length(height, width)
        longest = max(other.length(height, width) for other in self.directions)
        u = F.pad(direction.scan(tokens, height, width), (0, 0, 0, longest - own))
        y = self.scan_direction(k, u)[:, :own]
        return self.multi_scan["attn"](_restore(direction, y, height, width))


def _restore(direction: Direction, y: Tensor, height: int, width: int) -> Tensor:
    """Returns row-major tokens as the official code does, with which the published weights were trained.

    For columns it transposes an H×W map where the inverse of the scan transposes a W×H map: right on square maps only.
    """
    if not direction.columns:
        return direction.restore(y, height, width)
    return transpose_map(y.flip(1) if direction.flip else y, height, width)


class LocalVMamba(HierarchicalMamba):
    """LocalVMamba classifier: (B, C, H, W) images → (B, num_classes) logits.

    Args:
        in_chans: C.
        num_classes: 0 leaves the classifier out.
        embed_dim: channels of the first stage; each later stage has twice as many.
        depths: blocks of every stage.
        directions: names of the scans of every block (`Direction.parse`), stage after stage.
        ssm_ratio: inner channels of a block per channel.
        state: states of a channel.
        mlp_ratio: hidden channels of a block's MLP per channel; 0 leaves the MLP out.
        drop_path_rate: of the last block; it grows linearly from 0.

    Raises:
        ValueError: `directions` and `depths` have different numbers of blocks.

    Example:
        >>> import torch
        >>> model = LocalVMamba(num_classes=10, embed_dim=16, depths=(1, 1), directions=[("h", "w2")] * 2, state=4)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        directions: Sequence[Sequence[str]] = TINY,
        ssm_ratio: float = 2.0,
        state: int = 16,
        mlp_ratio: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if len(directions) != sum(depths):
            raise ValueError(
                f"directions has the scans of {len(directions)} blocks, depths={tuple(depths)} has {sum(depths)}"
            )
        super().__init__(
            nn.Sequential(nn.Conv2d(in_chans, embed_dim, 4, stride=4), to_channels_last(), nn.LayerNorm(embed_dim)),
            embed_dim,
            depths,
            lambda index, dim: LocalSS2D(dim, int(ssm_ratio * dim), state, directions[index]),
            PatchMerging,
            num_classes,
            mlp_ratio,
            drop_path_rate,
        )


class PatchMerging(nn.Module):
    """Norm and linear of every 2×2 pixels, left column first: (B, H, W, C) → (B, ceil(H / 2), ceil(W / 2), 2C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


SIZES: dict[str, dict[str, Any]] = {
    "local_vmamba_tiny": {},
    "local_vmamba_small": {"depths": (2, 2, 27, 2), "directions": SMALL},
    # maps of 8², 4², 2² tokens, for 32×32 images
    "local_vmamba_nano_32": {"num_classes": 10, "embed_dim": 24, "depths": (1, 1, 2), "directions": NANO, "state": 8},
    "local_vmamba_micro_32": {"num_classes": 10, "embed_dim": 40, "depths": (1, 2, 2), "directions": MICRO, "state": 4},
}
BUNDLED = {"local_vmamba_nano_32": ("digits",), "local_vmamba_micro_32": ("cifar10",)}

register(LocalVMamba, SIZES, BUNDLED, FeatureMaps, first_conv="patch_embed.0", classifier="classifier.head")
