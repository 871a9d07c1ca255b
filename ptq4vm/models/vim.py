"""Vision Mamba (Zhu et al. 2024), the "bimamba v2, middle class token, divided output" models that were released.

Parameters have the names of the public checkpoints (hustvl/Vim), which load strictly.
"""

from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor

from ptq4vm.models.isotropic import IsotropicMamba, Mixer
from ptq4vm.models.registry import register
from ptq4vm.models.scan_order import ROWS, ROWS_FLIP


class VimMixer(Mixer):
    """Mean of a scan of the tokens and a scan of the reversed tokens ("bimamba v2")."""

    def __init__(self, dim: int, state: int) -> None:
        super().__init__(dim, {"": ROWS, "_b": ROWS_FLIP}, state)

    def forward(self, x: Tensor) -> Tensor:
        xz, tokens = self.in_proj(x), x.shape[1]
        forward, backward = (
            direction.restore(self.branch(direction.scan(xz, 1, tokens), suffix), 1, tokens)
            for suffix, direction in self.directions.items()
        )
        return self.out_proj((forward + backward) / 2)


class Vim(IsotropicMamba):
    """Vision Mamba classifier: (B, C, H, W) images → (B, num_classes) logits.

    Args:
        img_size: height and width of the images, or one number for both.
        patch_size: side of a patch.
        in_chans: C.
        num_classes: 0 leaves the classifier out.
        embed_dim: channels of a token.
        depth: number of blocks.
        state: states of a channel.
        drop_path_rate: of the last block; it grows linearly from 0.

    Example:
        >>> import torch
        >>> model = Vim(img_size=32, patch_size=4, num_classes=10, embed_dim=16, depth=2)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        state: int = 16,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            PatchEmbed(img_size, patch_size, in_chans, embed_dim),
            [VimMixer(embed_dim, state) for _ in range(depth)],
            num_classes,
            embed_dim,
            class_token=True,
            drop_path_rate=drop_path_rate,
        )


_SMALL_IMAGES: dict[str, Any] = {"img_size": 32, "patch_size": 4, "num_classes": 10, "depth": 6}

SIZES: dict[str, dict[str, Any]] = {
    "vim_tiny_patch16_224": {"embed_dim": 192},
    "vim_small_patch16_224": {"embed_dim": 384},
    "vim_base_patch16_224": {"embed_dim": 768},
    # 65 tokens, for 32×32 images
    "vim_nano_patch4_32": {**_SMALL_IMAGES, "embed_dim": 64},
    "vim_micro_patch4_32": {**_SMALL_IMAGES, "embed_dim": 96, "state": 4},
}
BUNDLED = {"vim_nano_patch4_32": ("digits", "digits_hard"), "vim_micro_patch4_32": ("cifar10",)}

register(Vim, SIZES, BUNDLED, first_conv="patch_embed.proj", classifier="head")
