"""Base of VMamba and LocalVMamba: stages of residual blocks on channels-last maps, each half the size of the last.

Shapes: B images, H×W maps, C channels of a stage, E inner channels, K directions, S states, R rank of the dt
projection. The official VMamba is channels-first with 1×1 convolutions; the parameters are the same.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import FeatureInfo
from torch import Tensor, nn

from ptq4vm.models.scan_order import Direction, initial_dt_, initial_states, scan_tokens


class Permute(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


def to_channels_last() -> Permute:
    return Permute(0, 2, 3, 1)


def to_channels_first() -> Permute:
    return Permute(0, 3, 1, 2)


class SS2D(nn.Module):
    """2-D selective scan, (B, H, W, C) → (B, H, W, C): the sum of one scan per direction, with stacked weights."""

    def __init__(self, dim: int, inner: int, state: int, directions: Sequence[Direction], gated: bool = False) -> None:
        super().__init__()
        self.directions = tuple(directions)
        count, rank = len(self.directions), math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner if gated else inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=gated)
        self.x_proj_weight = nn.Parameter(torch.empty(count, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(count, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(count, inner))
        self.A_logs = nn.Parameter(initial_states(count * inner, state))
        self.Ds = nn.Parameter(torch.ones(count * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        initial_dt_(self.dt_projs_weight, self.dt_projs_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.out_norm(self.scan(self.in_proj(x))))

    def scan(self, x: Tensor) -> Tensor:
        """Applies depth-wise convolution and SiLU, and sums over directions: (B, H, W, E) → (B, H, W, E)."""
        height, width = x.shape[1:3]
        convolved = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        tokens = convolved.flatten(1, 2)
        branches = (self.branch(k, tokens, height, width) for k in range(len(self.directions)))
        merged = functools.reduce(torch.add, branches)
        return merged.unflatten(1, (height, width))

    def branch(self, k: int, tokens: Tensor, height: int, width: int) -> Tensor:
        """Scans in direction k and returns to row-major order: (B, L, E) → (B, L, E)."""
        direction = self.directions[k]
        return direction.restore(self.scan_direction(k, direction.scan(tokens, height, width)), height, width)

    def scan_direction(self, k: int, u: Tensor) -> Tensor:
        A_log, D = (stacked.unflatten(0, (len(self.directions), -1))[k] for stacked in (self.A_logs, self.Ds))
        return scan_tokens(u, None, self.x_proj_weight[k], self.dt_projs_weight[k], self.dt_projs_bias[k], A_log, D)


class VSSBlock(nn.Module):
    """Residual block, (B, H, W, C) → (B, H, W, C): x + op(norm(x)), then x + mlp(norm2(x)) where there is an MLP."""

    def __init__(self, dim: int, op: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = op
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim) if mlp_ratio else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio)) if mlp_ratio else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class Stage(nn.Module):
    """Blocks on maps of one size; `downsample` halves the maps and doubles the channels for the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Classifier(nn.Module):
    """Norm, mean over the map, linear: (B, H, W, C) → logits (B, num_classes)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x).mean((1, 2))
        return x if pre_logits else self.head(x)


RENAMED = {
    "patch_embed.proj.": "patch_embed.0.",
    "patch_embed.norm.": "patch_embed.2.",
    "norm.": "classifier.norm.",
    "head.": "classifier.head.",
}
"""Beginnings of names in the oldest checkpoints, and in the models here."""

STACKED = {".x_proj.weight": ".x_proj_weight", ".dt_projs.weight": ".dt_projs_weight"}
"""Ends of the names of grouped linears (K·N, C) in the newest code, and of stacked weights (K, N, C) here."""


def released_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of any release under the names used here, 1×1 convolutions (N, C, 1, 1) as linears (N, C)."""
    return dict(_stacked(_renamed(name), _matrix(name, value), state) for name, value in state.items())


def _stacked(name: str, value: Tensor, state: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """Returns a grouped linear's name and weight as those of K stacked ones, K as the bias of its dt projection has."""
    old = next((old for old in STACKED if name.endswith(old)), None)
    bias = None if old is None else state.get(f"{name.removesuffix(old)}.dt_projs_bias")
    if old is None or bias is None or bias.ndim != 2 or value.ndim != 2 or len(value) % len(bias):
        return name, value
    return name.removesuffix(old) + STACKED[old], value.unflatten(0, (len(bias), -1))


def _renamed(name: str) -> str:
    old = next((old for old in RENAMED if name.startswith(old)), None)
    name = name if old is None else RENAMED[old] + name.removeprefix(old)
    return name.replace(".ln_1.", ".norm.").replace(".self_attention.", ".op.")


def _matrix(name: str, value: Tensor) -> Tensor:
    linear = name.endswith(("proj.weight", "dt_projs.weight", "fc1.weight", "fc2.weight")) and value.shape[2:] == (1, 1)
    return value.flatten(1) if linear else value


class HierarchicalMamba(nn.Module):
    """Classifier: (B, C, H, W) images → (B, num_classes) logits.

    Args:
        patch_embed: images → maps (B, H / 4, W / 4, dim).
        dim: channels of the first stage; each later stage has twice as many.
        depths: blocks of every stage.
        mixer: makes the op of a block from the block's index in the model and its channels.
        downsample: makes the module between two stages from the channels of the first one.
    """

    checkpoint_filter = staticmethod(released_weights)

    def __init__(
        self,
        patch_embed: nn.Module,
        dim: int,
        depths: Sequence[int],
        mixer: Callable[[int, int], nn.Module],
        downsample: Callable[[int], nn.Module],
        num_classes: int,
        mlp_ratio: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        channels = [dim * 2**i for i in range(len(depths))]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = channels[-1]
        self.patch_embed = patch_embed
        total, stages, done = sum(depths), [], 0
        for i, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            blocks = [
                VSSBlock(width, mixer(index, width), mlp_ratio, drop_path_rate * index / max(1, total - 1))
                for index in range(done, done + depth)
            ]
            stages.append(Stage(blocks, downsample(width) if i < len(depths) - 1 else nn.Identity()))
            done += depth
        self.layers = nn.ModuleList(stages)
        self.classifier = Classifier(channels[-1], num_classes)
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"layers.{i}"} for i, width in enumerate(channels)
        ]
        self.apply(_initialize)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".A_logs", ".Ds"))}

    def get_classifier(self) -> nn.Module:
        return self.classifier.head

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classifier.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the map of the last stage, (B, H, W, C)."""
        x = self.patch_embed(x)
        stage: Any
        for stage in self.layers:
            x = stage.downsample(stage(x))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.classifier(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _initialize(module: nn.Module) -> None:
    """Initializes a linear as the official training code does."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FeatureMaps(nn.Module):
    """Backbone for detection or segmentation: images (B, C, H, W) → the maps of the chosen stages, channels first.

    `timm.create_model(name, features_only=True)` returns it. Each map has a norm, `outnorm0` …, as in the official
    detectors; a classifier's checkpoint has none. `feature_info` has channels and strides.

    Args:
        model: hierarchical; its stages are shared, not copied.
        out_indices: stages, counted from the end if negative; None for all.

    Raises:
        ValueError: there is no such stage.

    Example:
        >>> import timm, torch, ptq4vm.models
        >>> model = timm.create_model("vmamba_nano_32", features_only=True)
        >>> [tuple(x.shape) for x in model(torch.zeros(2, 3, 32, 32))]
        [(2, 24, 8, 8), (2, 48, 4, 4), (2, 96, 2, 2)]
    """

    stages_name = "layers"

    @staticmethod
    def checkpoint_filter(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return released_weights(state)

    def __init__(self, model: Any, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.patch_embed = model.patch_embed
        self.add_module(self.stages_name, model.get_submodule(self.stages_name))
        count = len(model.get_submodule(self.stages_name))
        chosen = range(count) if out_indices is None else out_indices
        if not all(-count <= i < count for i in chosen):
            raise ValueError(f"out_indices={tuple(chosen)}: the model has {count} stages, from 0 to {count - 1}")
        indices = sorted({i % count for i in chosen})
        self.feature_info = FeatureInfo(model.feature_info, tuple(indices))
        for i in indices:
            self.add_module(f"outnorm{i}", nn.LayerNorm(model.feature_info[i]["num_chs"]))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.patch_embed(x), []
        stage: Any
        for i, stage in enumerate(getattr(self, self.stages_name)):
            x = stage(x)
            if i in self.feature_info.out_indices:
                maps.append(self.normalized(x, self.get_submodule(f"outnorm{i}")))
            x = stage.downsample(x)
        return maps

    def normalized(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Returns a stage's map, channels first, with the norm of its channels."""
        return norm(x).permute(0, 3, 1, 2)
