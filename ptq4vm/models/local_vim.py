"""LocalVim (Huang et al. 2024): Vim's blocks with four scan directions each, found by search, some in local windows.

Parameters have the names of the public checkpoints (hunto/LocalMamba), which load strictly.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor

from ptq4vm.models.isotropic import IsotropicMamba, Mixer
from ptq4vm.models.registry import register
from ptq4vm.models.scan_order import ChannelGate, Direction, direction_table

SEARCHED = direction_table(
    """
    h v_flip w7 w7_flip | h_flip w2_flip w7 w7_flip | h h_flip v w7 | h h_flip v v_flip
    h h_flip v v_flip | h h_flip v v_flip | h_flip v v_flip w7 | h_flip v v_flip w2_flip
    h h_flip v v_flip | h h_flip v v_flip | h v v_flip w2 | h v v_flip w2_flip
    h h_flip v_flip w7 | h_flip v v_flip w2 | h h_flip v v_flip | h v w2 w2_flip
    v v_flip w2 w7 | h h_flip v w2 | h h_flip w2_flip w7 | v v_flip w2 w2_flip
    """
)
"""Directions of every block, as the published search found them."""

FIXED = (("h", "h_flip", "w2", "w2_flip"),) * 20
"""Directions of `local_vim_small`: the official file defines the name twice, and registers the second."""

NANO = (("h", "v_flip", "w2", "w2_flip"), ("h_flip", "v", "w4", "w4_flip")) * 2


class LocalVimMixer(Mixer):
    """Sum of the scans of all directions, each through the block's channel gate; a class token keeps its place."""

    def __init__(
        self, dim: int, state: int, directions: Sequence[str], grid: tuple[int, int], class_token: bool
    ) -> None:
        super().__init__(dim, {f"_{k}": Direction.parse(name) for k, name in enumerate(directions)}, state)
        self.grid = grid
        self.cls_index = grid[0] * grid[1] // 2 if class_token else None
        self.attn = ChannelGate(self.out_proj.in_features)

    def forward(self, x: Tensor) -> Tensor:
        xz = self.in_proj(x)
        return self.out_proj(functools.reduce(torch.add, (self._direction(xz, suffix) for suffix in self.directions)))

    def _direction(self, xz: Tensor, suffix: str) -> Tensor:
        direction = self.directions[suffix]
        if self.cls_index is None:
            return self.attn(direction.restore(self.branch(direction.scan(xz, *self.grid), suffix), *self.grid))
        patches, cls = self._split(xz)
        y, y_cls = self._split(self.branch(self._join(direction.scan(patches, *self.grid), cls), suffix))
        return self.attn(self._join(direction.restore(y, *self.grid), y_cls))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tokens without the class token, and the class token (B, 1, C)."""
        assert self.cls_index is not None
        before, cls, after = x.tensor_split((self.cls_index, self.cls_index + 1), dim=1)
        return torch.cat((before, after), 1), cls

    def _join(self, x: Tensor, cls: Tensor) -> Tensor:
        return torch.cat((x[:, : self.cls_index], cls, x[:, self.cls_index :]), 1)


class LocalVim(IsotropicMamba):
    """LocalVim classifier: (B, C, H, W) images → (B, num_classes) logits.

    Args:
        img_size: height and width of the images, or one number for both.
        patch_size: side of a patch.
        in_chans: C.
        num_classes: 0 leaves the classifier out.
        embed_dim: channels of a token.
        directions: names of the scans of every block (`Direction.parse`); there are as many blocks.
        state: states of a channel.
        class_token: read the logits from a token in the middle; otherwise from the mean token, with rotary embedding.
        drop_path_rate: of the last block; it grows linearly from 0.

    Example:
        >>> import torch
        >>> model = LocalVim(img_size=32, patch_size=4, num_classes=10, embed_dim=16, directions=[("h", "v_flip")])
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
        directions: Sequence[Sequence[str]] = SEARCHED,
        state: int = 16,
        class_token: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        grid = patch_embed.grid_size
        super().__init__(
            patch_embed,
            [LocalVimMixer(embed_dim, state, names, grid, class_token) for names in directions],
            num_classes,
            embed_dim,
            class_token=class_token,
            drop_path_rate=drop_path_rate,
        )


_SMALL_IMAGES: dict[str, Any] = {"img_size": 32, "patch_size": 4, "num_classes": 10, "directions": NANO}

SIZES: dict[str, dict[str, Any]] = {
    "local_vim_tiny": {"embed_dim": 192},
    "local_vim_tiny_middle_cls": {"embed_dim": 192, "class_token": True},
    "local_vim_small": {"embed_dim": 384, "directions": FIXED},
    "local_vim_small_searched": {"embed_dim": 384, "directions": SEARCHED},
    # 64 tokens, for 32×32 images
    "local_vim_nano_patch4_32": {**_SMALL_IMAGES, "embed_dim": 48, "state": 8},
    "local_vim_micro_patch4_32": {**_SMALL_IMAGES, "embed_dim": 64, "state": 4},
}
BUNDLED = {"local_vim_nano_patch4_32": ("digits",), "local_vim_micro_patch4_32": ("cifar10",)}

register(LocalVim, SIZES, BUNDLED, first_conv="patch_embed.proj", classifier="head")
