"""VMamba (Liu et al. 2024), the "v05_noz" models that were released: four directions, no gate, an MLP in every block.

Parameter names are those of the public checkpoints (MzeroMiko/VMamba), so that they load strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ptq4vm.models.hierarchical import SS2D, FeatureMaps, HierarchicalMamba, to_channels_first, to_channels_last
from ptq4vm.models.registry import cifar10, create, digits, imagenet
from ptq4vm.models.scan_order import COLUMNS, COLUMNS_FLIP, ROWS, ROWS_FLIP

CROSS_SCAN = (ROWS, COLUMNS, ROWS_FLIP, COLUMNS_FLIP)


class VMamba(HierarchicalMamba):
    """VMamba classifier: (B, C, H, W) images → (B, num_classes) logits."""

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
            4,
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


ENDS = ("patch_embed.0", "classifier.head")

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s1l8": imagenet(*ENDS),
        "vmamba_tiny_s2l5": imagenet(*ENDS),
        "vmamba_small_s2l15": imagenet(*ENDS),
        "vmamba_small_s1l20": imagenet(*ENDS),
        "vmamba_base_s2l15": imagenet(*ENDS),
        "vmamba_base_s1l20": imagenet(*ENDS),
        "vmamba_nano_32.digits": digits(*ENDS, "vmamba_nano_32.digits.safetensors"),
        "vmamba_micro_32.cifar10": cifar10(*ENDS, "vmamba_micro_32.cifar10.safetensors"),
    }
)


def _create(name: str, pretrained: bool, changes: dict[str, Any], **defaults: Any) -> VMamba:
    return create(VMamba, name, pretrained, defaults, changes, FeatureMaps)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    return _create("vmamba_tiny_s1l8", pretrained, kwargs, embed_dim=96, depths=(2, 2, 8, 2), ssm_ratio=1.0)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    return _create("vmamba_tiny_s2l5", pretrained, kwargs, embed_dim=96, depths=(2, 2, 5, 2), ssm_ratio=2.0)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    return _create("vmamba_small_s2l15", pretrained, kwargs, embed_dim=96, depths=(2, 2, 15, 2), ssm_ratio=2.0)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    return _create("vmamba_small_s1l20", pretrained, kwargs, embed_dim=96, depths=(2, 2, 20, 2), ssm_ratio=1.0)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    return _create("vmamba_base_s2l15", pretrained, kwargs, embed_dim=128, depths=(2, 2, 15, 2), ssm_ratio=2.0)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    return _create("vmamba_base_s1l20", pretrained, kwargs, embed_dim=128, depths=(2, 2, 20, 2), ssm_ratio=1.0)


@register_model
def vmamba_nano_32(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Maps of 8², 4², 2² tokens, for 32×32 images."""
    return _create("vmamba_nano_32", pretrained, kwargs, num_classes=10, embed_dim=24, depths=(1, 1, 2))


@register_model
def vmamba_micro_32(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Maps of 8², 4², 2² tokens, for 32×32 images."""
    return _create("vmamba_micro_32", pretrained, kwargs, num_classes=10, embed_dim=48, depths=(1, 2, 2))
