"""MambaVision, Spatial-Mamba and EfficientViM: scans beside attention, filters of states, and no scan at all."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from helpers.authors_models.layers import DropPath, Mlp
from ptq4vm.authors import stand_ins

with stand_ins():
    import selective_scan_cuda_oflex_rh
    from Dwconv.dwconv_layer import DepthwiseFunction
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

STATES, RANK = 4, 2


class VisionMixer(nn.Module):
    """Half of the channels scanned, half only filtered; products of all tokens of the batch in one axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.in_proj, self.out_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.x_proj, self.dt_proj = nn.Linear(half, RANK + 2 * STATES, bias=False), nn.Linear(RANK, half)
        self.conv1d_x, self.conv1d_z = (nn.Conv1d(half, half, 3, groups=half, bias=False) for _ in range(2))
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))

    def forward(self, hidden_states):
        B, L, _ = hidden_states.shape
        x, z = self.in_proj(hidden_states).permute(0, 2, 1).chunk(2, dim=1)
        x, z = (
            F.silu(F.conv1d(input=part, weight=conv.weight, bias=conv.bias, padding="same", groups=part.shape[1]))
            for part, conv in ((x, self.conv1d_x), (z, self.conv1d_z))
        )
        x_dbl = self.x_proj(x.permute(0, 2, 1).reshape(B * L, -1))
        dt, Bs, Cs = torch.split(x_dbl, [RANK, STATES, STATES], dim=-1)
        dt, Bs, Cs = (value.reshape(B, L, -1).permute(0, 2, 1) for value in (self.dt_proj(dt), Bs, Cs))
        y = selective_scan_fn(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            Bs.contiguous(),
            Cs.contiguous(),
            self.D.float(),
            z=None,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=None,
        )
        return self.out_proj(torch.cat([y, z], dim=1).permute(0, 2, 1))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class VisionBlock(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = nn.LayerNorm(dim), mixer, nn.LayerNorm(dim), Mlp(dim)
        self.gamma_1, self.gamma_2 = 1, nn.Parameter(torch.rand(dim))
        self.drop_path = DropPath()

    def forward(self, x):
        x = x + self.drop_path(self.gamma_1 * self.mixer(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class ConvBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(dim, dim, 3, 1, 1), nn.BatchNorm2d(dim), nn.GELU("tanh")
        self.conv2, self.norm2 = nn.Conv2d(dim, dim, 3, 1, 1), nn.BatchNorm2d(dim)

    def forward(self, x):
        return x + self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))


class VisionStage(nn.Module):
    """Blocks on windows, which are images of a larger batch; the batch is found again by a division of floats."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList([VisionBlock(dim, VisionMixer(dim)), VisionBlock(dim, Attention(dim))])

    def forward(self, x):
        _, C, H, W = x.shape
        ws = self.window
        right, below = (ws - W % ws) % ws, (ws - H % ws) % ws
        Hp, Wp = H, W
        if right > 0 or below > 0:
            x = F.pad(x, (0, right, 0, below))
            _, _, Hp, Wp = x.shape
        B = x.shape[0]
        x = x.view(B, C, Hp // ws, ws, Wp // ws, ws)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(-1, ws * ws, C)
        for block in self.blocks:
            x = block(x)
        B = int(x.shape[0] / (Hp * Wp / ws / ws))
        x = x.reshape(B, Hp // ws, Wp // ws, ws, ws, -1)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(B, x.shape[5], Hp, Wp)
        return x[:, :, :H, :W].contiguous() if right > 0 or below > 0 else x


class MambaVision(nn.Module):
    """A stage of convolutions, a padded one of windows, batch norms in the stem and before the head."""

    images = (3, 24, 24)
    linears = tuple(
        f"levels.1.blocks.{name}"
        for name in (
            *(f"0.{name}" for name in ("mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj")),
            *("0.mlp.fc1", "0.mlp.fc2", "1.mixer.qkv", "1.mixer.proj", "1.mlp.fc1", "1.mlp.fc2"),
        )
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        conv, norm = nn.Conv2d(3, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim, eps=1e-4)
        self.patch_embed = nn.Sequential(conv, norm, nn.ReLU())
        first = nn.Sequential(ConvBlock(dim), nn.Conv2d(dim, dim, 3, 2, 1, bias=False))
        self.levels = nn.ModuleList([first, VisionStage(dim, 4)])
        self.norm, self.avgpool, self.head = nn.BatchNorm2d(dim), nn.AdaptiveAvgPool2d(1), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
        return self.head(torch.flatten(self.avgpool(self.norm(x)), 1))


class StateFusion(nn.Module):
    """Three dilated filters merged into one when first run, kept as an attribute."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.alpha = dim, nn.Parameter(torch.rand(2))
        self.kernel_3, self.kernel_3_1 = (nn.Parameter(torch.randn(dim, 1, 3, 3) / 3) for _ in range(2))

    def forward(self, h):
        if not hasattr(self, "_merge_weight"):
            self._merge_weight = torch.zeros((self.dim, 1, 7, 7), device=h.device)
            self._merge_weight[:, :, 2:5, 2:5] = self.alpha[0] * self.kernel_3
            for i in range(3):
                for j in range(3):
                    part = self.alpha[1] * self.kernel_3_1[:, :, i : i + 1, j : j + 1]
                    self._merge_weight[:, :, 3 * i : 3 * i + 1, 3 * j : 3 * j + 1] += part
        return DepthwiseFunction.apply(h, self._merge_weight, None, 7 // 2, 7 // 2, False)


class ScanStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, delta_bias):
        states, x, *_ = selective_scan_cuda_oflex_rh.fwd(u, delta, A, B.unsqueeze(1), None, delta_bias, True, 1, True)
        last = x[:, :, -1, 1::2]
        ctx.save_for_backward(u, delta, A, B, delta_bias, last)
        return states


class SpatialMixer(nn.Module):
    """Products as matmuls of a weight with an axis of size one; the states are filtered as a map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = 2 * dim
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.randn(RANK + 2, inner) / 4)
        self.dt_projs_weight, self.dt_projs_bias = (
            nn.Parameter(torch.randn(inner, RANK)),
            nn.Parameter(torch.rand(inner)),
        )
        self.A_logs, self.Ds = nn.Parameter(torch.zeros(inner, 1)), nn.Parameter(torch.ones(inner))
        self.state_fusion, self.out_norm = StateFusion(inner), nn.LayerNorm(inner)

    def forward(self, x):
        B, H, W, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        C, xs = x.shape[1], x.view(B, -1, H * W)
        x_dbl = torch.matmul(self.x_proj_weight.view(1, -1, C), xs)
        dts, Bs, Cs = torch.split(x_dbl, [RANK, 1, 1], dim=1)
        dts = torch.matmul(self.dt_projs_weight.view(1, C, -1), dts).contiguous()
        h = ScanStates.apply(xs, dts, -torch.exp(self.A_logs), Bs, self.dt_projs_bias)
        h = self.state_fusion(h.reshape(B, C, H, W)).reshape(B, C, H * W)
        y = h * Cs + xs * self.Ds.view(-1, 1)
        y = self.out_norm(y.reshape(B, C, H, W).permute(0, 2, 3, 1)) * F.silu(z)
        return self.out_proj(y)


class SpatialBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cpe1, self.cpe2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        self.ln_1, self.self_attention = nn.LayerNorm(dim), SpatialMixer(dim)
        self.ln_2, self.mlp, self.drop_path = nn.LayerNorm(dim), Mlp(dim), DropPath()

    def forward(self, x):
        x = x + self.cpe1(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.self_attention(self.ln_1(x)))
        x = x + self.cpe2(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class SpatialMamba(nn.Module):
    images = (3, 8, 8)
    linears = (
        "layers.0.blocks.0.self_attention.in_proj",
        "layers.0.blocks.0.self_attention.x_proj_weight_linear",
        "layers.0.blocks.0.self_attention.dt_projs_weight_linear",
        *(f"layers.0.blocks.0.{name}" for name in ("self_attention.out_proj", "mlp.fc1", "mlp.fc2")),
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        self.layers = nn.ModuleList([nn.Sequential()])
        self.layers[0].add_module("blocks", nn.Sequential(SpatialBlock(dim)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).permute(0, 3, 1, 2).mean((2, 3)))


class Normed(nn.Module):
    """A convolution, batch norm and ReLU, as many repositories have."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x):
        x = self.conv(x)
        x = self.norm(x) if self.norm else x
        return self.act(x) if self.act else x


class ChannelNorm(nn.Module):
    """A layer norm of channels, in single operations."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, dim, 1)), nn.Parameter(torch.zeros(1, dim, 1))

    def forward(self, x):
        mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias


class HiddenStateMixer(nn.Module):
    """EfficientViM's mixer: attention-like sums into a few states, products of the states, and back."""

    def __init__(self, dim: int, states: int) -> None:
        super().__init__()
        self.states = states
        self.BCdt_proj, self.hz_proj = (
            Normed(nn.Conv1d(dim, 3 * states, 1, bias=False)),
            Normed(nn.Conv1d(dim, 2 * dim, 1, bias=False)),
        )
        self.dw = Normed(nn.Conv2d(3 * states, 3 * states, 3, 1, 1, groups=3 * states, bias=False))
        self.out_proj = Normed(nn.Conv1d(dim, dim, 1, bias=False))
        self.A, self.D = nn.Parameter(torch.rand(states)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        B, _, L = x.shape
        side = int(math.sqrt(L))
        BCdt = self.dw(self.BCdt_proj(x).view(B, -1, side, side)).flatten(2)
        Bs, Cs, dt = torch.split(BCdt, [self.states] * 3, dim=1)
        h = x @ ((dt + self.A.view(1, -1, 1)).softmax(-1) * Bs).transpose(-2, -1)
        h, z = torch.split(self.hz_proj(h), [x.shape[1]] * 2, dim=1)
        h = self.out_proj(h * F.silu(z) + h * self.D)
        return (h @ Cs).view(B, -1, side, side).contiguous(), h


class ViMBlock(nn.Module):
    """Convex sums of a branch and its input, with a learned weight for each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mixer, self.norm = HiddenStateMixer(dim, 3), ChannelNorm(dim)
        self.dwconv1 = Normed(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, bias=False), nn.BatchNorm2d(dim))
        self.fc1 = Normed(nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.BatchNorm2d(2 * dim), nn.ReLU())
        self.fc2 = Normed(nn.Conv2d(2 * dim, dim, 1, bias=False), nn.BatchNorm2d(dim))
        self.alpha = nn.Parameter(torch.randn(3, dim))

    def forward(self, x):
        alpha = torch.sigmoid(self.alpha).view(3, -1, 1, 1)
        x = (1 - alpha[0]) * x + alpha[0] * self.dwconv1(x)
        y, h = self.mixer(self.norm(x.flatten(2)))
        x = (1 - alpha[1]) * x + alpha[1] * y
        return (1 - alpha[2]) * x + alpha[2] * self.fc2(self.fc1(x)), h


class EfficientViM(nn.Module):
    """Two heads, of the map and of the states, and a learned sum of their logits."""

    images = (3, 8, 8)
    linears = tuple(
        f"stages.0.{name}.conv" for name in ("mixer.BCdt_proj", "mixer.hz_proj", "mixer.out_proj", "fc1", "fc2")
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed = Normed(nn.Conv2d(3, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        self.stages, self.weights = nn.ModuleList([ViMBlock(dim)]), nn.Parameter(torch.ones(2))
        self.norm, self.heads = ChannelNorm(dim), nn.ModuleList([nn.Linear(dim, 5) for _ in range(2)])

    def forward(self, x):
        x = self.patch_embed(x)
        for stage in self.stages:
            x, h = stage(x)
        weights = self.weights.softmax(-1)
        of_states = self.heads[0](F.adaptive_avg_pool1d(self.norm(h), 1).flatten(1))
        return weights[0] * of_states + weights[1] * self.heads[1](F.adaptive_avg_pool2d(x, 1).flatten(1))
