"""Vim, LocalVim, a stack of mamba_ssm's Mamba, and PlainMamba."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.authors_models.layers import ChannelGate, DropPath, gates
from ptq4vm.authors import stand_ins

with stand_ins():
    from mamba_ssm import Mamba
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj, selective_scan_fn
    from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

STATES, RANK = 4, 2


def direction(inner: int, suffix: str) -> dict[str, nn.Module | nn.Parameter]:
    """Parameters of one scan, by the names of Vim's fork."""
    return {
        f"conv1d{suffix}": nn.Conv1d(inner, inner, 4, groups=inner, padding=3),
        f"x_proj{suffix}": nn.Linear(inner, RANK + 2 * STATES, bias=False),
        f"dt_proj{suffix}": nn.Linear(RANK, inner),
        f"A{suffix}_log": nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(inner, 1)),
        f"D{suffix}": nn.Parameter(torch.ones(inner)),
    }


class VimMixer(nn.Module):
    """Products of the whole batch's tokens, and two scans of the fused inner function."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 4 * dim, bias=False)
        for suffix in ("", "_b"):
            for name, value in direction(2 * dim, suffix).items():
                setattr(self, name, value)
        self.out_proj = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, hidden_states):
        B, L, D = hidden_states.shape
        folded = hidden_states.permute(2, 0, 1).reshape(D, B * L)
        xz = (self.in_proj.weight @ folded).reshape(-1, B, L).permute(1, 0, 2)
        out = self.scan(xz, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        back = self.scan(xz.flip([-1]), self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        merged = (out + back.flip([-1])).permute(0, 2, 1)
        return F.linear(merged / 2, self.out_proj.weight, self.out_proj.bias)

    def scan(self, xz, conv1d, x_proj, dt_proj, A_log, D):
        return mamba_inner_fn_no_out_proj(
            xz,
            conv1d.weight,
            conv1d.bias,
            x_proj.weight,
            dt_proj.weight,
            -torch.exp(A_log.float()),
            None,
            None,
            D.float(),
            delta_bias=dt_proj.bias.float(),
            delta_softplus=True,
        )


class FusedAddNorm(nn.Module):
    """Vim's block: the sum and the norm in one function, the residual in float32."""

    def __init__(self, dim: int, mixer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.mixer, self.norm, self.drop_path = mixer, norm, DropPath()

    def forward(self, hidden_states, residual=None):
        norm = rms_norm_fn if isinstance(self.norm, RMSNorm) else layer_norm_fn
        hidden_states, residual = norm(
            hidden_states if residual is None else self.drop_path(hidden_states),
            self.norm.weight,
            self.norm.bias,
            residual=residual,
            prenorm=True,
            residual_in_fp32=True,
            eps=self.norm.eps,
        )
        return self.mixer(hidden_states), residual


class Vim(nn.Module):
    """A class token in the middle; the last norm is a function of the norm's parameters."""

    images = (3, 8, 8)
    linears = tuple(
        f"layers.{block}.mixer.{name}"
        for block in range(2)
        for name in ("in_proj", "x_proj", "dt_proj", "x_proj_b", "dt_proj_b", "out_proj")
    )

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim))
        self.layers = nn.ModuleList([FusedAddNorm(dim, VimMixer(dim), RMSNorm(dim)) for _ in range(2)])
        self.norm_f, self.head = RMSNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        position = x.shape[1] // 2
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat((x[:, :position, :], cls_token, x[:, position:, :]), dim=1) + self.pos_embed
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        norm = self.norm_f
        x = rms_norm_fn(
            x, norm.weight, norm.bias, eps=norm.eps, residual=residual, prenorm=False, residual_in_fp32=True
        )
        return self.head(x[:, position, :])


class LocalVimMixer(nn.Module):
    """Four orders of the tokens, a channel gate for each result, and their sum as a stack."""

    choices = ("h", "v_flip", "w2", "w2_flip")

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side, self.in_proj = side, nn.Linear(dim, 4 * dim, bias=False)
        for i in range(4):
            for name, value in direction(2 * dim, f"_{i}").items():
                setattr(self, name, value)
        self.attn, self.out_proj = ChannelGate(2 * dim), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, hidden_states):
        xz = self.in_proj(hidden_states)
        outs = []
        for i, choice in enumerate(self.choices):
            parts = {name: getattr(self, f"{name}_{i}") for name in ("conv1d", "x_proj", "dt_proj", "D")}
            out = VimMixer.scan(self, self.arrange(xz, choice), A_log=getattr(self, f"A_{i}_log"), **parts)
            outs.append(self.restore(out, choice).permute(0, 2, 1))
        out = torch.stack([self.attn(out) for out in outs]).sum(0)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias)

    def arrange(self, x, choice):
        """(B, L, D) → (B, D, L)."""
        B, L, D = x.shape
        grid = x.reshape(B, self.side, self.side, D).permute(0, 3, 1, 2)
        if choice[0] == "w":
            windows = grid.reshape(B, D, self.side // 2, 2, self.side // 2, 2).permute(0, 1, 2, 4, 3, 5)
            grid = windows.reshape(B, D, self.side, self.side)
        elif choice[0] == "v":
            grid = grid.permute(0, 1, 3, 2)
        x = grid.reshape(B, D, L)
        return x.flip([-1]) if choice.endswith("flip") else x

    def restore(self, x, choice):
        """(B, D, L) → (B, D, L)."""
        B, D, L = x.shape
        x = x.flip([-1]) if choice.endswith("flip") else x
        if choice[0] == "w":
            x = x.reshape(B, D, self.side // 2, self.side // 2, 2, 2).permute(0, 1, 2, 4, 3, 5)
        elif choice[0] == "v":
            x = x.reshape(B, D, self.side, self.side).permute(0, 1, 3, 2)
        return x.reshape(B, D, L)


class LocalVim(nn.Module):
    images = (3, 8, 8)
    linears = (
        "layers.0.mixer.in_proj",
        *(f"layers.0.mixer.{name}_{i}" for i in range(4) for name in ("x_proj", "dt_proj")),
        *gates("layers.0.mixer.attn", 4),
        "layers.0.mixer.out_proj",
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.layers = nn.ModuleList([FusedAddNorm(dim, LocalVimMixer(dim, 4), RMSNorm(dim))])
        self.norm_f, self.head = RMSNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        x = rms_norm_fn(x, self.norm_f.weight, None, residual=residual, eps=self.norm_f.eps)
        return self.head(x.mean(dim=1))


class MambaStack(nn.Module):
    """What users build on mamba_ssm: the numbered modules are mixers, whose products are in their own forward."""

    images = (3, 8, 8)
    linears = tuple(f"layers.{i}.{name}" for i in range(2) for name in ("in_proj", "x_proj", "dt_proj", "out_proj"))

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.layers = nn.ModuleList([Mamba(dim, d_state=STATES) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x).mean(1))


class PlainMixer(nn.Module):
    """Four zigzag orders as lists of indices, with a direction's own part of B."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        inner = 2 * dim
        self.side, self.in_proj, self.out_proj = side, nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj, self.dt_proj = nn.Linear(inner, RANK + 2 * STATES, bias=False), nn.Linear(RANK, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(inner, 1))
        self.D, self.direction_Bs = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.randn(5, STATES))
        grid = torch.arange(side * side).view(side, side)
        zigzag = torch.cat([row.flip(0) if i % 2 else row for i, row in enumerate(grid)])
        across = torch.cat([row.flip(0) if i % 2 else row for i, row in enumerate(grid.t())])
        orders = (zigzag, zigzag.flip(0), across, across.flip(0))
        self.orders = [tuple(order.tolist()) for order in orders]
        self.inverses = [tuple(order.argsort().tolist()) for order in orders]
        self.kinds = [tuple((k + i) % 5 for i in range(side * side)) for k in range(4)]

    def forward(self, x):
        B, L, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        grid = x.reshape(B, self.side, self.side, -1).permute(0, 3, 1, 2)
        x = F.silu(self.conv2d(grid)).permute(0, 2, 3, 1).reshape(B, L, -1)
        dt, Bs, Cs = torch.split(self.x_proj(x), [RANK, STATES, STATES], dim=-1)
        dt, Bs, Cs = (value.permute(0, 2, 1).contiguous() for value in (self.dt_proj(dt), Bs, Cs))
        A, ys = -torch.exp(self.A_log.float()), []
        for order, inverse, kinds in zip(self.orders, self.inverses, self.kinds, strict=True):
            own = self.direction_Bs[kinds, :][None].expand(B, -1, -1).permute(0, 2, 1).to(dtype=Bs.dtype)
            y = selective_scan_fn(
                x[:, order, :].permute(0, 2, 1).contiguous(),
                dt,
                A,
                (Bs + own).contiguous(),
                Cs,
                self.D.float(),
                z=None,
                delta_bias=self.dt_proj.bias.float(),
                delta_softplus=True,
                return_last_state=False,
            )
            ys.append(y.permute(0, 2, 1)[:, inverse, :])
        return self.out_proj(sum(ys) * F.silu(z))


class PlainBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.mamba, self.drop_path = nn.LayerNorm(dim), PlainMixer(dim, 4), DropPath()

    def forward(self, x):
        return self.drop_path(self.mamba(self.norm(x))) + x


class PlainMamba(nn.Module):
    """A backbone: returns the tokens and a map of them; batch norm and ReLU in place in its stem."""

    images = (3, 16, 16)
    linears = tuple(
        f"layers.{i}.mamba.{name}" for i in range(2) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")
    )

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(True))
        self.projection = nn.Conv2d(6, dim, 2, 2)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, dim))
        self.layers = nn.ModuleList([PlainBlock(dim) for _ in range(2)])
        self.norm1 = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.projection(self.stem(x)).flatten(2).transpose(1, 2) + self.pos_embed
        for layer in self.layers:
            x = layer(x)
        x = self.norm1(x)
        return x, x.reshape(x.shape[0], 4, 4, -1).permute(0, 3, 1, 2)
