"""Vision Mamba (Zhu et al. 2024), the "bimamba v2, middle class token, divided output" models that were released.

Shapes: B images, L tokens, D model width, E inner width, S states, R rank of the step projection.
Parameter names are those of the public checkpoints (hustvl/Vim), so that they load strictly.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ptq4vm import ops

PRETRAINED = Path(__file__).parent / "pretrained"


class VimMixer(nn.Module):
    """The bidirectional Mamba mixer ("bimamba v2"): (B, L, D) → (B, L, D)."""

    conv1d: nn.Conv1d
    conv1d_b: nn.Conv1d
    x_proj: nn.Linear
    x_proj_b: nn.Linear
    dt_proj: nn.Linear
    dt_proj_b: nn.Linear
    A_log: nn.Parameter
    A_b_log: nn.Parameter

    def __init__(self, dim: int, state: int = 16, expand: int = 2, taps: int = 4) -> None:
        super().__init__()
        self.inner, self.state, self.rank = expand * dim, state, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=False)
        for suffix in ("", "_b"):
            conv = nn.Conv1d(self.inner, self.inner, taps, groups=self.inner, padding=taps - 1)
            self.add_module("conv1d" + suffix, conv)
            self.add_module("x_proj" + suffix, nn.Linear(self.inner, self.rank + 2 * state, bias=False))
            self.add_module("dt_proj" + suffix, nn.Linear(self.rank, self.inner))
        for name in ("A_log", "A_b_log"):
            states = torch.arange(1, state + 1, dtype=torch.float32).log().repeat(self.inner, 1)
            self.register_parameter(name, nn.Parameter(states))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.D_b = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, dim, bias=False)
        for projection in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(projection.weight, -(self.rank**-0.5), self.rank**-0.5)
            step = torch.exp(torch.rand(self.inner) * math.log(100) + math.log(1e-3))
            with torch.no_grad():
                projection.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor) -> Tensor:
        xz = self.in_proj(x)
        forward = self._scan(xz, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        backward = self._scan(xz.flip(1), self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        return self.out_proj((forward + backward.flip(1)) / 2)

    def _scan(
        self, xz: Tensor, conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor
    ) -> Tensor:
        x, z = xz.chunk(2, dim=-1)
        u = ops.causal_conv1d(x, conv.weight.squeeze(1), conv.bias, True)
        low_rank, B, C = x_proj(u).split((self.rank, self.state, self.state), dim=-1)
        delta = F.linear(low_rank, dt_proj.weight)  # its bias belongs to the scan, before softplus
        A = -torch.exp(A_log.float())
        return ops.selective_scan(u, delta, A, B, C, D.float(), z, dt_proj.bias.float(), True)


class VimBlock(nn.Module):
    """Pre-norm block with the residual stream carried beside the mixer's output."""

    def __init__(self, dim: int, state: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = VimMixer(dim, state)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual + self.drop_path(hidden)
        return self.mixer(self.norm(residual)), residual


class Vim(nn.Module):
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
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        patches = self.patch_embed.num_patches
        self.cls_index = patches // 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, embed_dim))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.layers = nn.ModuleList(VimBlock(embed_dim, state, rate) for rate in rates)
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5)
        self.drop_path = DropPath(drop_path_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"layers.{i}"} for i in range(depth)
        ]
        self._initialize()

    def _initialize(self) -> None:
        """As the official training code: truncated normal, residual projections scaled down by depth."""
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, VimMixer):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.out_proj.weight /= math.sqrt(len(self.layers))
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = {name for name, _ in self.named_parameters() if name.endswith(("A_log", "A_b_log", ".D", ".D_b"))}
        return names | {"cls_token", "pos_embed"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalized tokens (B, L, D) after the last block."""
        patches = self.patch_embed(x)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        hidden = torch.cat((patches[:, : self.cls_index], cls, patches[:, self.cls_index :]), dim=1)
        hidden, residual = hidden + self.pos_embed, None
        for block in self.layers:
            hidden, residual = block(hidden, residual)
        return self.norm_f(residual + self.drop_path(hidden))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x[:, self.cls_index]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(**changes: Any) -> dict[str, Any]:
    base = {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return base | changes


def _digits(name: str) -> dict[str, Any]:
    grey = (0.5, 0.5, 0.5)
    return _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, mean=grey, std=grey, file=str(PRETRAINED / name))


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224": _cfg(),
        "vim_small_patch16_224": _cfg(),
        "vim_base_patch16_224": _cfg(),
        "vim_nano_patch4_32.digits": _digits("vim_nano_patch4_32.digits.safetensors"),
        "vim_nano_patch4_32.digits_hard": _digits("vim_nano_patch4_32.digits_hard.safetensors"),
    }
)


def _create(name: str, pretrained: bool, defaults: dict[str, Any], changes: dict[str, Any]) -> Vim:
    return build_model_with_cfg(Vim, name, pretrained, **(defaults | changes))


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create("vim_tiny_patch16_224", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create("vim_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create("vim_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


@register_model
def vim_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> Vim:
    """65 tokens, for 32×32 images."""
    defaults = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 64, "depth": 6}
    return _create("vim_nano_patch4_32", pretrained, defaults, kwargs)
