"""Base of Vim and LocalVim: equal pre-norm blocks on the patches of an image, with the residual stream beside them.

Shapes: B images, H×W patches, L tokens, D model width, E inner width, S states, R rank of the dt projection.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from ptq4vm import ops
from ptq4vm.models.scan_order import Direction, initial_dt_, initial_states, scan_tokens


class RotaryEmbedding(nn.Module):
    """Rotates channel pairs of (B, H·W, D) by the token's row (first half of the channels) and column (second half)."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, dim: int, grid: tuple[int, int], base: float = 10000.0) -> None:
        super().__init__()
        half = dim // 2
        rates = base ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
        rows, columns = (torch.outer(torch.arange(side, dtype=torch.float32), rates) for side in grid)
        height, width = grid
        angles = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), -1)
        angles = angles.repeat_interleave(2, -1).flatten(0, 1)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), -1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


class Mixer(nn.Module):
    """Mamba's mixer with several directions, each with weights of its own: (B, L, D) → (B, L, D).

    `directions` has the scans by the suffix of their parameters' names. Subclasses merge the results.
    """

    def __init__(
        self, dim: int, directions: Mapping[str, Direction], state: int, expand: int = 2, taps: int = 4
    ) -> None:
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.directions = dict(directions)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        for suffix in directions:
            self.add_module(f"conv1d{suffix}", nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1))
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, rank + 2 * state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(rank, inner))
            self.register_parameter(_state_name(suffix), nn.Parameter(initial_states(inner, state)))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        for suffix in directions:
            dt_proj: Any = self.get_submodule(f"dt_proj{suffix}")
            initial_dt_(dt_proj.weight, dt_proj.bias)

    def branch(self, xz: Tensor, suffix: str) -> Tensor:
        """Scans one direction, whose order the tokens are in already: input and gate (B, L, 2E) → (B, L, E)."""
        parts: list[Any] = [self.get_submodule(name + suffix) for name in ("conv1d", "x_proj", "dt_proj")]
        conv, x_proj, dt_proj = parts
        A_log, D = self.get_parameter(_state_name(suffix)), self.get_parameter(f"D{suffix}")
        x, z = xz.chunk(2, dim=-1)
        u = ops.causal_conv1d(x, conv.weight.squeeze(1), conv.bias, True)
        return scan_tokens(u, z, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D)


def _state_name(suffix: str) -> str:
    return "A_b_log" if suffix == "_b" else f"A_log{suffix}"


class Block(nn.Module):
    """Pre-norm block with the residual stream carried beside the mixer's output."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual + self.drop_path(hidden)
        return self.mixer(self.norm(residual)), residual


class IsotropicMamba(nn.Module):
    """Classifier, (B, C, H, W) images → (B, num_classes) logits, from a class token in the middle or the mean token.

    Without a class token, positions are rotary too.
    """

    def __init__(
        self,
        patch_embed: PatchEmbed,
        mixers: Sequence[nn.Module],
        num_classes: int,
        embed_dim: int,
        class_token: bool,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_embed = patch_embed
        patches = patch_embed.num_patches
        self.cls_index = patches // 2 if class_token else None
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + class_token, embed_dim))
        self.rope = RotaryEmbedding(embed_dim, patch_embed.grid_size) if not class_token else None
        rates = [drop_path_rate * i / max(1, len(mixers) - 1) for i in range(len(mixers))]
        self.layers = nn.ModuleList(Block(embed_dim, *pair) for pair in zip(mixers, rates, strict=True))
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5)
        self.drop_path = DropPath(drop_path_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        stride = patch_embed.patch_size[0]
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": stride, "module": f"layers.{i}"} for i in range(len(mixers))
        ]
        self._initialize()

    def _initialize(self) -> None:
        """Initializes as the official training code does: truncated normal, residual projections scaled by depth."""
        if self.cls_index is not None:
            trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, Mixer):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.out_proj.weight /= math.sqrt(len(self.layers))
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        leaves = {name: name.rpartition(".")[2] for name, _ in self.named_parameters()}
        whole = ("cls_token", "pos_embed", "D")
        return {name for name, leaf in leaves.items() if leaf in whole or leaf.startswith(("A_", "D_"))}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the normalized tokens (B, L, D) after the last block."""
        hidden: Tensor = self.patch_embed(x)
        residual: Tensor | None = None
        if self.cls_index is not None:
            cls = self.cls_token.expand(x.shape[0], -1, -1)
            hidden = torch.cat((hidden[:, : self.cls_index], cls, hidden[:, self.cls_index :]), dim=1)
        hidden = hidden + self.pos_embed
        for block in self.layers:
            if self.rope is not None:
                hidden = self.rope(hidden)
                residual = None if residual is None else self.rope(residual)
            hidden, residual = block(hidden, residual)
        return self.norm_f(residual + self.drop_path(hidden))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(1) if self.cls_index is None else x[:, self.cls_index]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
