"""EfficientVMamba, GroupMamba and MSVMamba: scans of parts of a map, and gates of channels beside them."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.authors_models.layers import DropPath, PatchMerging, ScanWeights
from helpers.authors_models.vmamba import RANK, STATES, SelectiveScan, scans
from ptq4vm.authors import stand_ins

with stand_ins():
    import selective_scan_cuda_core
    import selective_scan_cuda_oflex
    from selective_scan_vmamba_pt202 import selective_scan_cuda_core as of_a_package


class SkipScan(torch.autograd.Function):
    """Every other token of every other row, four times: EfficientVMamba's atrous scan."""

    @staticmethod
    def forward(ctx, x):
        B, C, H, W = x.shape
        xs = x.new_empty((B, 4, C, H * W // 4))
        xs[:, 0] = x[:, :, ::2, ::2].contiguous().view(B, C, -1)
        xs[:, 1] = x.transpose(dim0=2, dim1=3)[:, :, ::2, 1::2].contiguous().view(B, C, -1)
        xs[:, 2] = x[:, :, ::2, 1::2].contiguous().view(B, C, -1)
        xs[:, 3] = x.transpose(dim0=2, dim1=3)[:, :, 1::2, 1::2].contiguous().view(B, C, -1)
        return xs


class SkipMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ys, H, W):
        B, _, C, _ = ys.shape
        y, half = ys.new_empty((B, C, H, W)), (B, C, H // 2, W // 2)
        y[:, :, ::2, ::2] = ys[:, 0].reshape(half)
        y[:, :, 1::2, ::2] = ys[:, 1].reshape(half).transpose(dim0=2, dim1=3)
        y[:, :, ::2, 1::2] = ys[:, 2].reshape(half)
        y[:, :, 1::2, 1::2] = ys[:, 3].reshape(half).transpose(dim0=2, dim1=3)
        return y.view(B, C, -1)


class EfficientMixer(ScanWeights):
    def __init__(self, dim: int) -> None:
        super().__init__(2 * dim, RANK, STATES, 4)
        self.in_proj, self.out_proj = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.conv2d = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        self.out_norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        B, _, H, W = x.shape
        inputs = self.project(SkipScan.apply(x))
        ys = SelectiveScan.apply(of_a_package, *inputs, True, 1).view(B, 4, -1, H * W // 4)
        y = SkipMerge.apply(ys, int(H), int(W)).transpose(dim0=1, dim1=2).contiguous()
        return self.out_proj(self.out_norm(y).view(B, H, W, -1) * F.silu(z))


class SqueezeExcite(nn.Module):
    """Gates the channels of a map with 1×1 convolutions of its mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_reduce, self.conv_expand = nn.Conv2d(dim, dim // 2, 1), nn.Conv2d(dim // 2, dim, 1)

    def forward(self, x):
        mean = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.conv_expand(F.relu(self.conv_reduce(mean), inplace=True)))


class EfficientVMamba(nn.Module):
    """The scan's result and a convolution's, each with its own gate."""

    images = (3, 8, 8)
    linears = (
        "layers.0.blocks.0.op.in_proj",
        *scans("layers.0.blocks.0.op", 4),
        "layers.0.blocks.0.op.out_proj",
        "layers.0.downsample.reduction",
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.layers = nn.ModuleList([nn.Sequential()])
        self.layers[0].add_module("blocks", nn.Sequential(EfficientBlock(dim)))
        self.layers[0].add_module("downsample", PatchMerging(dim))
        self.norm, self.head = nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).flatten(1, 2).mean(1))


class EfficientBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.op, self.drop_path = nn.LayerNorm(dim), EfficientMixer(dim), DropPath()
        self.conv_branch = nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim), nn.BatchNorm2d(dim), nn.SiLU())
        self.se, self.conv_se = SqueezeExcite(dim), SqueezeExcite(dim)

    def forward(self, x):
        own = self.op(self.norm(x)).permute(0, 3, 1, 2).contiguous()
        local = self.conv_se(self.conv_branch(x.permute(0, 3, 1, 2).contiguous()))
        return x + self.drop_path((self.se(own) + local).permute(0, 2, 3, 1).contiguous())


class GroupMixer(ScanWeights):
    """One scan of a quarter of the channels."""

    def __init__(self, dim: int, turned: bool, flipped: bool) -> None:
        super().__init__(dim, RANK, 1, 1)
        self.turned, self.flipped = turned, flipped
        self.in_proj, self.out_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.conv2d, self.out_norm = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.LayerNorm(dim)

    def forward(self, x):
        x = F.silu(self.conv2d(self.in_proj(x).permute(0, 3, 1, 2).contiguous()))
        B, D, H, W = x.shape
        xs = x.new_empty((B, 1, D, H * W))
        tokens = (x.transpose(dim0=2, dim1=3) if self.turned else x).flatten(2, 3)
        xs[:, 0] = torch.flip(tokens, dims=[-1]) if self.flipped else tokens
        ys = SelectiveScan.apply(selective_scan_cuda_oflex, *self.project(xs), True, 1, True).view(B, 1, D, -1)
        y = ys[:, 0].flip(dims=[-1]) if self.flipped else ys[:, 0]
        if self.turned:
            y = y.view(B, D, W, H).transpose(dim0=2, dim1=3).contiguous().view(B, D, -1)
        y = self.out_norm(y.transpose(dim0=1, dim1=2).contiguous()).view(B, H, W, -1)
        return self.out_proj(y)


class GroupLayer(nn.Module):
    """Four mixers on a quarter of the channels each, and channels gated by the mean of the tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)
        self.norm, self.proj, self.skip_scale = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Parameter(torch.ones(1))
        for i in range(4):
            setattr(self, f"mamba_g{i + 1}", GroupMixer(dim // 4, bool(i & 1), bool(i & 2)))

    def forward(self, x, H, W):
        B, L, C = x.shape
        x = self.norm(x)
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.permute(0, 2, 1).mean(dim=2)))))
        grid = x.reshape(B, H, W, C)
        mixers = (self.mamba_g1, self.mamba_g2, self.mamba_g3, self.mamba_g4)
        parts = [mixer(part) for mixer, part in zip(mixers, torch.chunk(grid, 4, dim=-1), strict=True)]
        y = torch.cat(parts, dim=-1) * self.skip_scale * grid
        return self.proj(self.norm(y.reshape(B, L, C) * gate.unsqueeze(1)))


class GroupBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.norm2, self.drop_path = GroupLayer(dim), nn.LayerNorm(dim), DropPath()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.dwconv = nn.Conv2d(2 * dim, 2 * dim, 3, 1, 1, groups=2 * dim)

    def forward(self, x, H, W):
        x = x + self.drop_path(self.attn(x, H, W))
        y = self.fc1(self.norm2(x))
        B, _, C = y.shape
        y = self.dwconv(y.transpose(1, 2).view(B, C, H, W)).flatten(2).transpose(1, 2)
        return x + self.drop_path(self.fc2(F.gelu(y)))


class GroupMamba(nn.Module):
    """Heights and widths travel beside the tokens; ReLU in place after batch norm in the stem."""

    images = (3, 8, 8)
    linears = (
        *(
            f"block1.0.attn.mamba_g{i}.{name}"
            for i in range(1, 5)
            for name in ("in_proj", "x_proj_weight_linear", "dt_projs_weight_linear", "out_proj")
        ),
        *(f"block1.0.{name}" for name in ("attn.proj", "fc1", "fc2")),
    )

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.proj, self.norm = nn.Conv2d(6, dim, 3, 2, 1), nn.LayerNorm(dim)
        self.block1, self.norm1, self.head = nn.ModuleList([GroupBlock(dim)]), nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.proj(self.stem(x))
        _, _, H, W = x.shape
        x = self.norm(x.flatten(2).transpose(1, 2))
        for block in self.block1:
            x = block(x, H, W)
        return self.head(self.norm1(x).mean(dim=1))


class MultiScaleMixer(nn.Module):
    """One scan of all tokens, and one of three directions in a row at half the resolution, brought up again."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = 2 * dim
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.conv2d_b1 = nn.Conv2d(inner, inner, 3, 2, padding=1, groups=inner)
        self.fine, self.coarse = ScanWeights(inner, RANK, 1, 1), ScanWeights(inner, RANK, 1, 1)
        self.out_norm, self.out_norm_b1 = nn.LayerNorm(inner), nn.LayerNorm(inner)

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        B, H, W, _ = x.shape
        x = x.permute(0, 3, 1, 2).contiguous()
        small = F.silu(self.conv2d_b1(x))
        x = F.silu(self.conv2d(x))
        h, w = small.shape[2:]
        turned = small.transpose(2, 3).flatten(2)
        row = torch.cat([small.flatten(2).flip(-1), turned.contiguous(), turned.flip(-1).contiguous()], dim=2)
        y = self.out_norm(self.scan(self.fine, x.flatten(2)))
        parts = self.out_norm_b1(self.scan(self.coarse, row))
        back = parts[:, : h * w].flip(-2).view(B, h, w, -1).permute(0, 3, 1, 2)
        down = parts[:, h * w : 2 * h * w].view(B, w, h, -1).transpose(1, 2).permute(0, 3, 1, 2)
        up = parts[:, 2 * h * w :].flip(-2).view(B, w, h, -1).transpose(1, 2).permute(0, 3, 1, 2)
        small = F.interpolate(back + down + up, size=(H, W), mode="bilinear", align_corners=False)
        y = y.view(B, H, W, -1) + small.permute(0, 2, 3, 1).contiguous()
        return self.out_proj(y * F.silu(z))

    @staticmethod
    def scan(weights, x):
        """(B, D, L) → (B, L, D)."""
        return SelectiveScan.apply(selective_scan_cuda_core, *weights.project(x.unsqueeze(1)), True, 1).transpose(1, 2)


class ConvFfn(nn.Module):
    """1×1 convolutions around a depth-wise one, on (B, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, dim, 1)
        self.dwconv = nn.Conv2d(2 * dim, 2 * dim, 3, 1, 1, groups=2 * dim)

    def forward(self, x):
        x = self.fc1(x.permute(0, 3, 1, 2))
        return self.fc2(F.gelu(x + self.dwconv(x))).permute(0, 2, 3, 1)


class MSVMambaBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1, self.op, self.se = nn.LayerNorm(dim), MultiScaleMixer(dim), SqueezeExcite(dim)
        self.norm2, self.mlp, self.drop_path = nn.LayerNorm(dim), ConvFfn(dim), DropPath()

    def forward(self, x):
        y = self.se(self.op(self.ln_1(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MSVMamba(nn.Module):
    images = (3, 8, 8)
    linears = tuple(
        f"layers.0.blocks.0.{name}"
        for name in (
            "op.in_proj",
            "op.fine.x_proj_weight_linear",
            "op.fine.dt_projs_weight_linear",
            "op.coarse.x_proj_weight_linear",
            "op.coarse.dt_projs_weight_linear",
            "op.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        )
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.layers = nn.ModuleList([nn.Sequential()])
        self.layers[0].add_module("blocks", nn.Sequential(MSVMambaBlock(dim)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).permute(0, 3, 1, 2).flatten(2).mean(-1))
