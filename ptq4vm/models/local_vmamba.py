"""LocalVMamba (Huang et al. 2024): VMamba's stages with gated blocks and four searched directions a block.

Parameter names are those of the public checkpoints (hunto/LocalMamba), so that they load strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ptq4vm.models.hierarchical import SS2D, FeatureMaps, HierarchicalMamba, to_channels_last
from ptq4vm.models.registry import cifar10, create, digits, imagenet
from ptq4vm.models.scan_order import ChannelGate, Direction, direction_table, transpose_map

TINY = direction_table(
    """
    h h_flip w7 w7_flip
    h_flip v_flip w2 w2_flip
    h_flip v_flip w2_flip w7
    h_flip v v_flip w2
    h h_flip v_flip w2_flip
    h_flip v_flip w2 w2_flip
    h w2_flip w7 w7_flip
    h h_flip v v_flip
    h v_flip w7 w7_flip
    h_flip v w2 w7_flip
    v v_flip w2 w7_flip
    h h_flip v_flip w2_flip
    v_flip w2_flip w7 w7_flip
    h_flip v_flip w2_flip w7_flip
    h_flip v w7 w7_flip
    """
)
SMALL = direction_table(
    """
    h v v_flip w7_flip
    h h_flip v w7
    h_flip v v_flip w7
    h_flip v w2_flip w7
    h_flip v w2_flip w7
    h_flip v_flip w2 w7_flip
    h_flip v v_flip w7
    h v v_flip w7
    h v v_flip w7
    h v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w2
    v v_flip w2_flip w7
    h h_flip v w2
    h_flip v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w7_flip
    h v v_flip w7_flip
    h h_flip v_flip w7
    h_flip v_flip w2_flip w7
    h_flip v v_flip w7_flip
    v v_flip w7 w7_flip
    h v v_flip w7_flip
    h_flip v v_flip w2
    h v v_flip w2_flip
    h h_flip v w7
    h h_flip w7 w7_flip
    h v_flip w2 w2_flip
    h v_flip w2 w7
    h v v_flip w7_flip
    h_flip v w2_flip w7
    h_flip v_flip w7 w7_flip
    h v w7 w7_flip
    """
)
"""The published searches' directions of every block."""

NANO = (
    ("h", "h_flip", "w2", "w2_flip"),
    ("v", "v_flip", "w2", "w3_flip"),
    ("h", "v_flip", "w2", "w2_flip"),
    ("h_flip", "v", "w2", "w2_flip"),
)
MICRO = (*NANO, NANO[0])


class MultiScan(nn.Module):
    """Holds the channel gate, where the checkpoints have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn = ChannelGate(channels)


class LocalSS2D(SS2D):
    """SS2D gated by a second half of in_proj, every direction through the block's channel gate."""

    def __init__(self, dim: int, inner: int, state: int, directions: Sequence[str]) -> None:
        super().__init__(dim, inner, state, [Direction.parse(name) for name in directions], gated=True)
        self.multi_scan = MultiScan(inner)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.out_norm(self.scan(x)) * F.silu(z))

    def branch(self, k: int, tokens: Tensor, height: int, width: int) -> Tensor:
        """As the official code: all sequences of a block are as long as its longest, padded with zeros at their ends.

        That changes no result, since what follows a token does not reach it; it is how many tokens the linears see.
        """
        direction = self.directions[k]
        own = direction.length(height, width)
        longest = max(other.length(height, width) for other in self.directions)
        u = F.pad(direction.scan(tokens, height, width), (0, 0, 0, longest - own))
        y = self.scan_direction(k, u)[:, :own]
        return self.multi_scan.attn(_restore(direction, y, height, width))


def _restore(direction: Direction, y: Tensor, height: int, width: int) -> Tensor:
    """The official inverse, which for columns is one on square maps only; the published weights were trained with it.

    It takes the columns of the H×W map, as the scan did, where those of the W×H map would undo the scan.
    """
    if not direction.columns:
        return direction.restore(y, height, width)
    return transpose_map(y.flip(1) if direction.flip else y, height, width)


class LocalVMamba(HierarchicalMamba):
    """LocalVMamba classifier: (B, C, H, W) images → (B, num_classes) logits.

    `directions` names the scans of every block (`Direction.parse`), stage after stage.
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
                f"directions names the scans of {len(directions)} blocks, depths={tuple(depths)} has others"
            )
        super().__init__(
            nn.Sequential(nn.Conv2d(in_chans, embed_dim, 4, stride=4), to_channels_last(), nn.LayerNorm(embed_dim)),
            4,
            embed_dim,
            depths,
            lambda index, dim: LocalSS2D(dim, int(ssm_ratio * dim), state, directions[index]),
            PatchMerging,
            num_classes,
            mlp_ratio,
            drop_path_rate,
        )


class PatchMerging(nn.Module):
    """(B, H, W, C) → (B, ceil(H / 2), ceil(W / 2), 2C): norm and linear of every 2×2 pixels, left column first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


ENDS = ("patch_embed.0", "classifier.head")

default_cfgs = generate_default_cfgs(
    {
        "local_vmamba_tiny": imagenet(*ENDS),
        "local_vmamba_small": imagenet(*ENDS),
        "local_vmamba_nano_32.digits": digits(*ENDS, "local_vmamba_nano_32.digits.safetensors"),
        "local_vmamba_micro_32.cifar10": cifar10(*ENDS, "local_vmamba_micro_32.cifar10.safetensors"),
    }
)


@register_model
def local_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    return create(LocalVMamba, "local_vmamba_tiny", pretrained, {}, kwargs, FeatureMaps)


@register_model
def local_vmamba_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    defaults = {"depths": (2, 2, 27, 2), "directions": SMALL}
    return create(LocalVMamba, "local_vmamba_small", pretrained, defaults, kwargs, FeatureMaps)


@register_model
def local_vmamba_nano_32(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """Maps of 8², 4², 2² tokens, for 32×32 images."""
    defaults = {"num_classes": 10, "embed_dim": 24, "depths": (1, 1, 2), "directions": NANO, "state": 8}
    return create(LocalVMamba, "local_vmamba_nano_32", pretrained, defaults, kwargs, FeatureMaps)


@register_model
def local_vmamba_micro_32(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """Maps of 8², 4², 2² tokens, for 32×32 images."""
    defaults = {"num_classes": 10, "embed_dim": 40, "depths": (1, 2, 2), "directions": MICRO, "state": 4}
    return create(LocalVMamba, "local_vmamba_micro_32", pretrained, defaults, kwargs, FeatureMaps)
