"""VMamba and LocalVMamba: four scans of a map, channels first and last."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.authors_models.layers import (
    ChannelGate,
    DropPath,
    LayerNorm2d,
    Linear2d,
    Mlp,
    PatchMerging,
    ScanWeights,
    gates,
)
from ptq4vm.authors import stand_ins

with stand_ins():
    import selective_scan_cuda_core
    import selective_scan_cuda_oflex

STATES, RANK = 4, 2


def scans(name: str, count: int) -> tuple[str, ...]:
    return (
        *(f"{name}.x_proj_weight.{k}" for k in range(count)),
        *(f"{name}.dt_projs_weight.{k}" for k in range(count)),
    )


class CrossScan(torch.autograd.Function):
    """(B, C, H, W) → (B, 4, C, L), written into an empty tensor on the input's device, as VMamba's fallback is."""

    @staticmethod
    def forward(ctx, x):
        with torch.cuda.device(x.device):
            B, C, H, W = x.shape
            y = x.new_empty((B, 4, C, H * W))
            y[:, 0, :, :] = x.flatten(2, 3)
            y[:, 1, :, :] = x.transpose(dim0=2, dim1=3).flatten(2, 3)
            y[:, 2:4, :, :] = torch.flip(y[:, 0:2, :, :], dims=[-1])
        return y


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, module, *inputs):
        out, x, *_ = module.fwd(*inputs)
        ctx.save_for_backward(*(value for value in (*inputs[:7], x) if value is not None))
        return out


class VMambaMixer(ScanWeights):
    """Channel first, products as grouped convolutions of directions put together."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, RANK, 1, 4)
        self.in_proj, self.out_proj = Linear2d(dim, dim, bias=False), Linear2d(dim, dim, bias=False)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.out_norm = LayerNorm2d(dim)

    def forward(self, x):
        x = F.silu(self.conv2d(self.in_proj(x)))
        B, D, H, W = x.shape
        L, K, N, R = H * W, 4, self.states, self.rank
        xs = CrossScan.apply(x)
        x_dbl = F.conv1d(xs.view(B, -1, L), self.x_proj_weight.view(-1, D, 1), bias=None, groups=K)
        dts, Bs, Cs = torch.split(x_dbl.view(B, K, -1, L), [R, N, N], dim=2)
        dts = F.conv1d(dts.contiguous().view(B, -1, L), self.dt_projs_weight.view(K * D, -1, 1), groups=K)
        ys = SelectiveScan.apply(
            selective_scan_cuda_oflex,
            xs.view(B, -1, L),
            dts.contiguous().view(B, -1, L),
            -self.A_logs.to(torch.float).exp(),
            Bs.contiguous().view(B, K, N, L),
            Cs.contiguous().view(B, K, N, L),
            self.Ds.to(torch.float),
            self.dt_projs_bias.view(-1).to(torch.float),
            True,
            1,
            True,
        ).view(B, K, -1, H, W)
        y = self.out_norm(self.merge(ys).view(B, -1, H, W))
        return self.out_proj(y.to(x.dtype))

    @staticmethod
    def merge(y):
        B, _, D, H, W = y.shape
        y = y.view(B, 4, D, -1)
        y = y[:, 0:2] + y[:, 2:4].flip(dims=[-1]).view(B, 2, D, -1)
        return y[:, 0] + y[:, 1].view(B, -1, W, H).transpose(dim0=2, dim1=3).contiguous().view(B, D, -1)


class VMambaBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.op, self.norm2 = LayerNorm2d(dim), VMambaMixer(dim), LayerNorm2d(dim)
        self.mlp, self.drop_path = Mlp(dim, Linear2d), DropPath()

    def forward(self, x):
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VMamba(nn.Module):
    images = (3, 8, 8)
    linears = (
        "layers.0.blocks.0.op.in_proj",
        *scans("layers.0.blocks.0.op", 4),
        *(f"layers.0.blocks.0.{name}" for name in ("op.out_proj", "mlp.fc1", "mlp.fc2")),
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, dim, 2, 2), LayerNorm2d(dim))
        down = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1), LayerNorm2d(2 * dim))
        self.layers = nn.ModuleList([nn.Sequential()])
        self.layers[0].add_module("blocks", nn.Sequential(VMambaBlock(dim)))
        self.layers[0].add_module("downsample", down)
        self.norm, self.head = LayerNorm2d(2 * dim), nn.Linear(2 * dim, 5)

    def forward(self, x):
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(F.adaptive_avg_pool2d(self.norm(x), 1).flatten(1))


class LocalVMambaMixer(ScanWeights):
    """Rows and 2×2 windows in both directions, each result gated by itself and then summed as a stack."""

    def __init__(self, dim: int) -> None:
        inner = 2 * dim
        super().__init__(inner, RANK, STATES, 4)
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.out_norm, self.attn = nn.LayerNorm(inner), ChannelGate(inner)

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        B, D, H, W = x.shape
        windows = x.reshape(B, D, H // 2, 2, W // 2, 2).permute(0, 1, 2, 4, 3, 5).flatten(2)
        xs = torch.stack([x.flatten(2), x.flatten(2).flip([-1]), windows, windows.flip([-1])], 1)
        inputs = self.project(xs)
        ys = SelectiveScan.apply(selective_scan_cuda_core, *inputs, True, 1).view(B, 4, -1, H * W)
        rows, rows_flip, parts, parts_flip = (ys[:, i, :, : H * W] for i in range(4))
        outs = [rows, rows_flip.flip([-1]), self.unfold(parts, H, W), self.unfold(parts_flip.flip([-1]), H, W)]
        y = torch.stack([self.attn(out.transpose(-2, -1)) for out in outs]).sum(0)
        return self.out_proj(self.out_norm(y).view(B, H, W, -1) * F.silu(z))

    @staticmethod
    def unfold(x, H, W):
        B, D, L = x.shape
        return x.reshape(B, D, H // 2, W // 2, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(B, D, L)


class MixerBlock(nn.Module):
    """A block of one mixer: all of LocalVMamba's, VM-UNet's and MSVMamba's."""

    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.op, self.drop_path = nn.LayerNorm(dim), mixer, DropPath()

    def forward(self, x):
        return x + self.drop_path(self.op(self.norm(x)))


class LocalVMamba(nn.Module):
    """The downsampling's product is in no numbered module of its own."""

    images = (3, 8, 8)
    linears = (
        "layers.0.blocks.0.op.in_proj",
        *scans("layers.0.blocks.0.op", 4),
        *gates("layers.0.blocks.0.op.attn", 4),
        "layers.0.blocks.0.op.out_proj",
        "layers.0.downsample.reduction",
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed, self.patch_norm = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim)
        self.layers = nn.ModuleList([nn.Sequential()])
        self.layers[0].add_module("blocks", nn.Sequential(MixerBlock(dim, LocalVMambaMixer(dim))))
        self.layers[0].add_module("downsample", PatchMerging(dim))
        self.norm, self.head = nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 5)

    def forward(self, x):
        x = self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).permute(0, 3, 1, 2).mean((2, 3)))
