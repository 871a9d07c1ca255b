"""LocalVim (Huang et al. 2024): Vim's blocks with four searched directions a block, some through local windows.

Parameter names are those of the public checkpoints (hunto/LocalMamba), so that they load strictly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from ptq4vm.models.isotropic import IsotropicMamba, Mixer
from ptq4vm.models.registry import cifar10, create, digits, imagenet
from ptq4vm.models.scan_order import ChannelGate, Direction, direction_table

SEARCHED = direction_table(
    """
    h v_flip w7 w7_flip
    h_flip w2_flip w7 w7_flip
    h h_flip v w7
    h h_flip v v_flip
    h h_flip v v_flip
    h h_flip v v_flip
    h_flip v v_flip w7
    h_flip v v_flip w2_flip
    h h_flip v v_flip
    h h_flip v v_flip
    h v v_flip w2
    h v v_flip w2_flip
    h h_flip v_flip w7
    h_flip v v_flip w2
    h h_flip v v_flip
    h v w2 w2_flip
    v v_flip w2 w7
    h h_flip v w2
    h h_flip w2_flip w7
    v v_flip w2 w2_flip
    """
)
"""The published search's directions of every block."""

FIXED = (("h", "h_flip", "w2", "w2_flip"),) * 20
"""The second definition of `local_vim_small` in the official file, which timm's registry sees there."""

NANO = (("h", "v_flip", "w2", "w2_flip"), ("h_flip", "v", "w4", "w4_flip")) * 2


class LocalVimMixer(Mixer):
    """The sum of the directions' scans, each through the block's channel gate; a class token keeps its place."""

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
        """Tokens without the class token, and the class token (B, 1, C)."""
        assert self.cls_index is not None
        before, cls, after = x.tensor_split((self.cls_index, self.cls_index + 1), dim=1)
        return torch.cat((before, after), 1), cls

    def _join(self, x: Tensor, cls: Tensor) -> Tensor:
        return torch.cat((x[:, : self.cls_index], cls, x[:, self.cls_index :]), 1)


class LocalVim(IsotropicMamba):
    """LocalVim classifier: (B, C, H, W) images → (B, num_classes) logits.

    `directions` names the scans of every block (`Direction.parse`) and so gives the depth. With `class_token` the
    logits come from a token in the middle, without it from the mean token of rotary-embedded ones.
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
            rotary=not class_token,
            drop_path_rate=drop_path_rate,
        )


ENDS = ("patch_embed.proj", "head")

default_cfgs = generate_default_cfgs(
    {
        "local_vim_tiny": imagenet(*ENDS),
        "local_vim_tiny_middle_cls": imagenet(*ENDS),
        "local_vim_small": imagenet(*ENDS),
        "local_vim_small_searched": imagenet(*ENDS),
        "local_vim_nano_patch4_32.digits": digits(*ENDS, "local_vim_nano_patch4_32.digits.safetensors"),
        "local_vim_micro_patch4_32.cifar10": cifar10(*ENDS, "local_vim_micro_patch4_32.cifar10.safetensors"),
    }
)


@register_model
def local_vim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    return create(LocalVim, "local_vim_tiny", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def local_vim_tiny_middle_cls(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    defaults = {"embed_dim": 192, "class_token": True}
    return create(LocalVim, "local_vim_tiny_middle_cls", pretrained, defaults, kwargs)


@register_model
def local_vim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """With the directions of the official registry; `directions=SEARCHED` (or the next name) are the searched ones."""
    defaults = {"embed_dim": 384, "directions": FIXED}
    return create(LocalVim, "local_vim_small", pretrained, defaults, kwargs)


@register_model
def local_vim_small_searched(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    defaults = {"embed_dim": 384, "directions": SEARCHED}
    return create(LocalVim, "local_vim_small_searched", pretrained, defaults, kwargs)


@register_model
def local_vim_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """64 tokens, for 32×32 images."""
    defaults = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 48, "directions": NANO, "state": 8}
    return create(LocalVim, "local_vim_nano_patch4_32", pretrained, defaults, kwargs)


@register_model
def local_vim_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """64 tokens, for 32×32 images."""
    defaults = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 64, "directions": NANO, "state": 4}
    return create(LocalVim, "local_vim_micro_patch4_32", pretrained, defaults, kwargs)
