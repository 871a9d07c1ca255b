"""Vision Mamba (Zhu et al. 2024), the "bimamba v2, middle class token, divided output" models that were released.

Parameter names are those of the public checkpoints (hustvl/Vim), so that they load strictly.
"""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from ptq4vm.models.isotropic import IsotropicMamba, Mixer
from ptq4vm.models.registry import cifar10, create, digits, imagenet
from ptq4vm.models.scan_order import ROWS, ROWS_FLIP


class VimMixer(Mixer):
    """Bidirectional ("bimamba v2"): the mean of a scan of the tokens and a scan of the reversed tokens."""

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
    """Vision Mamba classifier: (B, C, H, W) images → (B, num_classes) logits."""

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
            rotary=False,
            drop_path_rate=drop_path_rate,
        )


ENDS = ("patch_embed.proj", "head")

default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224": imagenet(*ENDS),
        "vim_small_patch16_224": imagenet(*ENDS),
        "vim_base_patch16_224": imagenet(*ENDS),
        "vim_nano_patch4_32.digits": digits(*ENDS, "vim_nano_patch4_32.digits.safetensors"),
        "vim_nano_patch4_32.digits_hard": digits(*ENDS, "vim_nano_patch4_32.digits_hard.safetensors"),
        "vim_micro_patch4_32.cifar10": cifar10(*ENDS, "vim_micro_patch4_32.cifar10.safetensors"),
    }
)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    return create(Vim, "vim_tiny_patch16_224", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    return create(Vim, "vim_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    return create(Vim, "vim_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


@register_model
def vim_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> Vim:
    """65 tokens, for 32×32 images."""
    defaults = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 64, "depth": 6}
    return create(Vim, "vim_nano_patch4_32", pretrained, defaults, kwargs)


@register_model
def vim_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> Vim:
    """65 tokens, for 32×32 images."""
    defaults = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 96, "depth": 6, "state": 4}
    return create(Vim, "vim_micro_patch4_32", pretrained, defaults, kwargs)
