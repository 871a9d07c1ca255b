"""Directions in which a scan reads an image, and the scan itself, which all families share.

Shapes: B images, H×W map, L = H·W tokens in row-major order, T tokens of a scan, C or E channels, S states, R rank of
the dt projection. All maps are channels-last.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4vm import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """Order of the tokens of an H×W map: (B, L, C) ⇄ (B, T, C).

    Example:
        >>> import torch
        >>> tokens = torch.arange(6.0).view(1, 6, 1)  # a map of 2 rows and 3 columns
        >>> Direction.parse("v").scan(tokens, 2, 3).flatten().tolist()
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """

    columns: bool = False
    """Column by column; else row by row."""
    window: int | None = None
    """Side of square windows. Windows are read row by row, and so are the tokens in each. Zeros at the bottom and right
    fill the last windows of a map, and are read too."""
    flip: bool = False
    """Reverse the order, padding first."""

    @classmethod
    def parse(cls, name: str) -> Direction:
        """Reads LocalMamba's names: `h` rows, `v` columns, `w7` windows of 7×7; `h_flip`, `v_flip`, `w7_flip` reversed.

        Raises ValueError for any other name.
        """
        match = re.fullmatch(r"(?:h|(?P<columns>v)|w(?P<window>[1-9]\d*))(?P<flip>_flip)?", name)
        if match is None:
            raise ValueError(f"{name!r} is no scan direction; there are h, v, w2, w7, … and each with _flip")
        window = int(match["window"]) if match["window"] else None
        return cls(columns=bool(match["columns"]), window=window, flip=bool(match["flip"]))

    def length(self, height: int, width: int) -> int:
        """Returns T, which is more than L where windows need padding."""
        if self.window is None:
            return height * width
        return math.ceil(height / self.window) * math.ceil(width / self.window) * self.window**2

    def scan(self, x: Tensor, height: int, width: int) -> Tensor:
        """Puts row-major tokens into this order: (B, L, C) → (B, T, C)."""
        if self.columns:
            x = transpose_map(x, height, width)
        elif self.window is not None:
            k, down, right = self.window, -height % self.window, -width % self.window
            padded = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, right, 0, down))
            tiles = padded.unflatten(2, (-1, k)).unflatten(1, (-1, k))
            x = tiles.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)
        return x.flip(1) if self.flip else x

    def restore(self, y: Tensor, height: int, width: int) -> Tensor:
        """Undoes `scan` and drops the padding: (B, T, C) → (B, L, C)."""
        if self.flip:
            y = y.flip(1)
        if self.columns:
            return transpose_map(y, width, height)
        if self.window is not None:
            k = self.window
            rows, columns = math.ceil(height / k), math.ceil(width / k)
            tiles = y.unflatten(1, (rows, columns, k, k)).permute(0, 1, 3, 2, 4, 5)
            return tiles.flatten(3, 4).flatten(1, 2)[:, :height, :width].flatten(1, 2)
        return y


ROWS, ROWS_FLIP = Direction(), Direction(flip=True)
COLUMNS, COLUMNS_FLIP = Direction(columns=True), Direction(columns=True, flip=True)


def direction_table(text: str) -> tuple[tuple[str, ...], ...]:
    """Reads the names of the directions of every block; blocks are separated by `|` and ends of lines."""
    return tuple(tuple(block.split()) for line in text.strip().splitlines() for block in line.split("|"))


def transpose_map(x: Tensor, height: int, width: int) -> Tensor:
    """Transposes an H×W map, given and returned as row-major tokens (B, L, C)."""
    return x.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)


def scan_tokens(
    u: Tensor, z: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> Tensor:
    """Runs the selective scan of u (B, T, E), gated by z of the same shape.

    dt, B and C are projected from u: x_proj (R + 2S, E) makes [low-rank dt | B | C], dt_proj (E, R) makes dt (Gu and
    Dao 2023, algorithm 2); dt_bias, D (E,); A_log (E, S).
    """
    state = A_log.shape[1]
    low_rank, B, C = F.linear(u, x_proj).split((dt_proj.shape[1], state, state), dim=-1)
    dt = F.linear(low_rank, dt_proj)  # the scan adds the bias, before softplus
    A = -torch.exp(A_log.float())
    return ops.selective_scan(u, dt, A, B, C, D.float(), z, dt_bias.float(), True)


class ChannelGate(nn.Module):
    """Channel attention of LocalMamba (Huang et al. 2024): y (B, L, E) times a gate (B, 1, E) from the mean token."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.global_reduce = nn.Linear(channels, channels // reduction)
        self.channel_select = nn.Linear(channels // reduction, channels)

    def forward(self, y: Tensor) -> Tensor:
        mean = self.norm(y).mean(1)
        gate = torch.sigmoid(self.channel_select(F.gelu(self.global_reduce(mean))))
        return y * gate.unsqueeze(1)


def initial_states(channels: int, state: int) -> Tensor:
    """Returns A_log (E, S) = log 1 … log S in every channel (S4D-real)."""
    return torch.arange(1, state + 1, dtype=torch.float32).log().repeat(channels, 1)


def initial_dt_(weight: Tensor, bias: Tensor) -> None:
    """Fills dt_proj (E, R) and its bias (E,) so that softplus(bias) spreads over 0.001 … 0.1, as Mamba does."""
    nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
    dt = torch.exp(torch.rand_like(bias) * math.log(100) + math.log(1e-3))
    with torch.no_grad():
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))
