"""VM-UNet, MambaIR and MambaIRv2: models that return an image."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.authors_models.layers import DropPath, Mlp, PatchMerging, ScanWeights
from ptq4vm.authors import stand_ins

with stand_ins():
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from selective_scan import selective_scan_fn as selective_scan_fn_v1

STATES, RANK = 4, 2


def scans(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}.{k}" for kind in ("x_proj_weight", "dt_projs_weight") for k in range(count))


class StackedMixer(ScanWeights):
    """VMamba's first mixer, which VM-UNet and MambaIR have: stack, flip, einsum, and a sum of four results."""

    def __init__(self, dim: int, version: int = 0) -> None:
        inner = 2 * dim
        super().__init__(inner, RANK, STATES, 4)
        self.version, self.in_proj = version, nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.out_norm, self.out_proj = nn.LayerNorm(inner), nn.Linear(inner, dim, bias=False)

    def forward(self, x):
        B, H, W, _ = x.shape
        L = H * W
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        across = torch.transpose(x, dim0=2, dim1=3).contiguous().view(B, -1, L)
        both = torch.stack([x.view(B, -1, L), across], dim=1).view(B, 2, -1, L)
        xs = torch.cat([both, torch.flip(both, dims=[-1])], dim=1)
        *inputs, bias = self.project(xs)
        if self.version:
            y = selective_scan_fn_v1(*inputs, delta_bias=bias, delta_softplus=True).view(B, 4, -1, L)
        else:
            options = {"z": None, "delta_bias": bias, "delta_softplus": True, "return_last_state": False}
            y = selective_scan_fn(*inputs, **options).view(B, 4, -1, L)
        assert y.dtype == torch.float
        back = torch.flip(y[:, 2:4], dims=[-1]).view(B, 2, -1, L)
        down, up = (
            torch.transpose(value.view(B, -1, W, H), dim0=2, dim1=3).contiguous().view(B, -1, L)
            for value in (y[:, 1], back[:, 1])
        )
        y = y[:, 0] + back[:, 0] + down + up
        y = self.out_norm(torch.transpose(y, dim0=1, dim1=2).contiguous().view(B, H, W, -1))
        return self.out_proj(y * F.silu(z))


class StackedBlock(nn.Module):
    def __init__(self, dim: int, version: int) -> None:
        super().__init__()
        self.ln_1, self.self_attention, self.drop_path = nn.LayerNorm(dim), StackedMixer(dim, version), DropPath()

    def forward(self, x):
        return x + self.drop_path(self.self_attention(self.ln_1(x)))


class PatchExpand(nn.Module):
    """(B, H, W, C) → (B, 2H, 2W, C / 2): the product's channels hold four tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Linear(dim, 2 * dim, bias=False), nn.LayerNorm(dim // 2)

    def forward(self, x):
        B, H, W, C = x.shape
        x = self.expand(x).reshape(B, H, W, 2, 2, C // 2).permute(0, 1, 3, 2, 4, 5)
        return self.norm(x.reshape(B, 2 * H, 2 * W, C // 2))


class VMUNet(nn.Module):
    """Down, up with skip connections, and the logistic function of a map."""

    images = (3, 8, 8)
    linears = (
        "layers.0.self_attention.in_proj",
        *scans("layers.0.self_attention", 4),
        "layers.0.self_attention.out_proj",
        "downsample.reduction",
        "upsample.expand",
        "layers_up.0.self_attention.in_proj",
        *scans("layers_up.0.self_attention", 4),
        "layers_up.0.self_attention.out_proj",
        "final_up.expand",
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.layers, self.layers_up = nn.ModuleList([StackedBlock(dim, 0)]), nn.ModuleList([StackedBlock(dim, 1)])
        self.downsample, self.upsample, self.final_up = PatchMerging(dim), PatchExpand(2 * dim), PatchExpand(dim)
        self.final_conv = nn.Conv2d(dim // 2, 1, 1)

    def forward(self, x):
        if x.size()[1] == 1:
            x = x.repeat(1, 3, 1, 1)
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        skips = []
        for layer in self.layers:
            x = layer(x)
            skips.append(x)
        x = self.upsample(self.downsample(x))
        for i, layer in enumerate(self.layers_up):
            x = layer(x + skips[-1 - i])
        return torch.sigmoid(self.final_conv(self.final_up(x).permute(0, 3, 1, 2)))


class ChannelAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        down, up = nn.Conv2d(dim, dim // 4, 1), nn.Conv2d(dim // 4, dim, 1)
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), down, nn.ReLU(inplace=True), up, nn.Sigmoid())

    def forward(self, x):
        return x * self.attention(x)


class RestorationBlock(nn.Module):
    """A scan and a convolution branch, both beside a scaled input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1, self.self_attention, self.drop_path = nn.LayerNorm(dim), StackedMixer(dim), DropPath()
        self.ln_2 = nn.LayerNorm(dim)
        self.skip_scale, self.skip_scale2 = (nn.Parameter(torch.rand(dim)) for _ in range(2))
        self.conv_blk = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 3, 1, 1), nn.GELU(), nn.Conv2d(dim // 2, dim, 3, 1, 1), ChannelAttention(dim)
        )

    def forward(self, x, size):
        B, L, C = x.shape
        x = x.view(B, *size, C).contiguous()
        x = x * self.skip_scale + self.drop_path(self.self_attention(self.ln_1(x)))
        local = self.conv_blk(self.ln_2(x).permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1).contiguous()
        return (x * self.skip_scale2 + local).view(B, L, C).contiguous()


class MambaIR(nn.Module):
    """Doubles an image's sides. A mean of colours, no buffer, is taken away at the start and added at the end."""

    images = (3, 6, 6)
    linears = tuple(
        f"layers.{i}.self_attention.{name}" for i in range(2) for name in ("in_proj", *scans("@", 4), "out_proj")
    )
    linears = tuple(name.replace("@.", "") for name in linears)

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.mean, self.img_range = torch.tensor((0.4488, 0.4371, 0.4040)).view(1, 3, 1, 1), 2.0
        self.conv_first, self.conv_after_body = nn.Conv2d(3, dim, 3, 1, 1), nn.Conv2d(dim, dim, 3, 1, 1)
        self.layers, self.norm = nn.ModuleList([RestorationBlock(dim) for _ in range(2)]), nn.LayerNorm(dim)
        self.upsample = nn.Sequential(nn.Conv2d(dim, 12, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x):
        self.mean = self.mean.type_as(x)
        x = self.conv_first((x - self.mean) * self.img_range)
        x = self.upsample(self.conv_after_body(self.features(x)) + x)
        return x / self.img_range + self.mean

    def features(self, x):
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, size)
        return self.norm(x).transpose(1, 2).view(x.shape[0], -1, size[0], size[1])


class WindowAttention(nn.Module):
    """Swin's attention of shifted windows, with a mask and a table of relative positions."""

    def __init__(self, dim: int, window: int, heads: int = 2) -> None:
        super().__init__()
        self.window, self.heads, self.scale = window, heads, (dim // heads) ** -0.5
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        self.proj = nn.Linear(dim, dim)

    def forward(self, qkv, positions, mask):
        B, n, c3 = qkv.shape
        c = c3 // 3
        qkv = qkv.reshape(B, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        bias = self.table[positions.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = q @ k.transpose(-2, -1) + bias.unsqueeze(0)
        windows = mask.shape[0]
        attn = attn.view(B // windows, windows, self.heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, self.heads, n, n).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, n, c))


class SortedMixer(ScanWeights):
    """Sorts tokens by a learned class of each, scans the sorted row once, and puts the tokens back."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, RANK, STATES, 1)
        self.in_proj = nn.Sequential(nn.Conv2d(dim, dim, 1, 1, 0))
        self.CPE = nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim))
        self.embeddingA, self.embeddingB = nn.Embedding(6, STATES), nn.Embedding(3, 6)
        self.route = nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, 3), nn.LogSoftmax(dim=-1))
        self.out_norm, self.out_proj = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x, size):
        B, n, C = x.shape
        chosen = self.route(x).argmax(dim=-1)
        prompt = torch.matmul(F.one_hot(chosen, 3).to(x.dtype), self.embeddingB.weight @ self.embeddingA.weight)
        _, order = torch.sort(chosen, dim=-1, stable=True)
        back = torch.argsort(order, dim=-1)
        x = self.in_proj(x.permute(0, 2, 1).reshape(B, C, *size).contiguous())
        x = (x * torch.sigmoid(self.CPE(x))).view(B, C, -1).contiguous().permute(0, 2, 1)
        x = torch.gather(x, 1, order.unsqueeze(-1).expand(-1, -1, C))
        *inputs, Cs, Ds, bias = self.project(x.permute(0, 2, 1).view(B, 1, C, n).contiguous())
        Cs = Cs + prompt.permute(0, 2, 1).contiguous().view(B, 1, STATES, n)
        y = selective_scan_fn(*inputs, Cs, Ds, z=None, delta_bias=bias, delta_softplus=True, return_last_state=False)
        y = self.out_proj(self.out_norm(y.view(B, 1, -1, n)[:, 0].permute(0, 2, 1).contiguous()))
        return torch.gather(y, 1, back.unsqueeze(-1).expand(-1, -1, C))


class AttentiveBlock(nn.Module):
    """Window attention whose qkv is a product of all tokens, an MLP, and the sorted scan."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.window, self.norm1, self.norm2, self.norm3 = window, *(nn.LayerNorm(dim) for _ in range(3))
        self.wqkv, self.win_mhsa, self.mlp = nn.Linear(dim, 3 * dim), WindowAttention(dim, window), Mlp(dim)
        self.assm = SortedMixer(dim)

    def forward(self, x, size, positions, mask):
        (h, w), (B, n, C), ws = size, x.shape, self.window
        qkv = self.wqkv(self.norm1(x)).reshape(B, h, w, 3 * C)
        qkv = torch.roll(qkv, shifts=(-ws // 2, -ws // 2), dims=(1, 2))
        windows = qkv.view(B, h // ws, ws, w // ws, ws, 3 * C).permute(0, 1, 3, 2, 4, 5).contiguous()
        y = self.win_mhsa(windows.view(-1, ws * ws, 3 * C), positions, mask).view(-1, ws, ws, C)
        back = int(y.shape[0] / (h * w / ws / ws))
        y = y.view(back, h // ws, w // ws, ws, ws, -1).permute(0, 1, 3, 2, 4, 5).contiguous().view(back, h, w, -1)
        y = torch.roll(y, shifts=(ws // 2, ws // 2), dims=(1, 2)).view(B, n, C)
        x = y + x
        x = x + self.mlp(self.norm2(x))
        return x + self.assm(self.norm3(x), size)


class MambaIRv2(nn.Module):
    """Denoises; pads by mirrored images up to whole windows. (The original draws its routes at random.)"""

    images = (3, 7, 6)
    linears = tuple(
        f"layers.0.{name}"
        for name in (
            *("wqkv", "win_mhsa.proj", "mlp.fc1", "mlp.fc2", "assm.route.0", "assm.route.2", "assm.in_proj.0"),
            *("assm.x_proj_weight_linear", "assm.dt_projs_weight_linear", "assm.out_proj"),
        )
    )

    def __init__(self, dim: int = 8, window: int = 4) -> None:
        super().__init__()
        self.mean, self.window = torch.tensor((0.4488, 0.4371, 0.4040)).view(1, 3, 1, 1), window
        self.conv_first, self.conv_last = nn.Conv2d(3, dim, 3, 1, 1), nn.Conv2d(dim, 3, 3, 1, 1)
        self.layers, self.norm = nn.ModuleList([AttentiveBlock(dim, window)]), nn.LayerNorm(dim)
        steps = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = steps[:, None] - steps[None] + window - 1
        self.register_buffer("positions", apart[..., 0] * (2 * window - 1) + apart[..., 1])

    def forward(self, x):
        height, width, ws = x.size()[-2], x.size()[-1], self.window
        h, w = ((side + ws - 1) // ws * ws for side in (height, width))
        x = torch.cat([x, torch.flip(x, [2])], 2)[:, :, :h, :]
        x = torch.cat([x, torch.flip(x, [3])], 3)[:, :, :, :w]
        self.mean = self.mean.type_as(x)
        x = x - self.mean
        mask = self.mask(h, w).to(x.device)
        tokens = self.conv_first(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, (h, w), self.positions, mask)
        y = self.norm(tokens).transpose(1, 2).view(x.shape[0], -1, h, w)
        return (x + self.conv_last(y) + self.mean)[..., :height, :width]

    def mask(self, h, w):
        """Windows × tokens × tokens: 0 between tokens of one part of the rolled image, −100 elsewhere."""
        ws, parts = self.window, torch.zeros((1, h, w, 1))
        slices = (slice(0, -ws), slice(-ws, -(ws // 2)), slice(-(ws // 2), None))
        for i, rows in enumerate(slices):
            for j, columns in enumerate(slices):
                parts[:, rows, columns, :] = 3 * i + j
        windows = parts.view(1, h // ws, ws, w // ws, ws, 1).permute(0, 1, 3, 2, 4, 5).reshape(-1, ws * ws)
        apart = windows.unsqueeze(1) - windows.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)
