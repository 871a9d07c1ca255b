"""The layouts of integer weights: 4-bit codes in pairs, and the tiles and padded rows that kernels read."""

import torch
import torch.nn.functional as F
from torch import Tensor

N_TILE, K_TILE = 16, 64
"""Output channels and input channels in a tile of a packed weight."""


def pack_int4(codes: Tensor) -> Tensor:
    """Packs two codes a byte along the last axis, low nibble first; an odd axis is padded with a zero code."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return _bytes(codes[..., 0::2], codes[..., 1::2])


def unpack_int4(packed: Tensor, channels: int) -> Tensor:
    """Returns int8 codes (…, channels): the inverse of `pack_int4`."""
    return torch.stack(_nibbles(packed), -1).flatten(-2)[..., :channels]


def _bytes(low: Tensor, high: Tensor) -> Tensor:
    return ((high << 4) | (low & 15)).to(torch.uint8)


def _nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the codes in the low and in the high halves of bytes; int8 shifts to the right keep the sign."""
    codes = packed.view(torch.int8)
    return (codes << 4) >> 4, codes >> 4


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Packs int8 codes (…, N, D) into the tiles (…, ceil(N / 16), ceil(D / 64), 16, 64) of the kernels, zero padded.

    A row of 64 bytes holds four input channels of each of 16 output channels. Up to 4 bits its two halves share bytes,
    (…, 16, 32) uint8: the first 32 codes of a row are the low nibbles, the last 32 the high ones.
    """
    features, channels = codes.shape[-2:]
    padded = F.pad(codes, (0, -channels % K_TILE, 0, -features % N_TILE))
    tiles = padded.unflatten(-1, (-1, 16, 4)).unflatten(-4, (-1, N_TILE)).movedim(-4, -2).flatten(-2)
    return tiles.contiguous() if bits > 4 else _bytes(tiles[..., :32], tiles[..., 32:])


def tiles_shape(features: int, channels: int, packed: bool) -> tuple[int, int, int, int]:
    """Returns the shape of the weight that `pack_weight` makes, of bytes of two codes if `packed`."""
    return -(-features // N_TILE), -(-channels // K_TILE), N_TILE, K_TILE // 2 if packed else K_TILE


def unpack_weight(packed: Tensor, features: int, channels: int) -> Tensor:
    """Returns int8 codes (…, features, channels): the inverse of `pack_weight`."""
    tiles = torch.cat(_nibbles(packed), -1) if packed.dtype == torch.uint8 else packed
    codes = tiles.unflatten(-1, (N_TILE, 4)).movedim(-2, -4).flatten(-3).flatten(-3, -2)
    return codes[..., :features, :channels]


def pad_weight(codes: Tensor, bits: int) -> Tensor:
    """Pads int8 codes (…, N, D) with zeros to the rows of GPUs' linears, D to a multiple of 16.

    Up to 4 bits two codes share a byte, as in `pack_int4`, and D is padded to a multiple of 32: that is for tensor
    cores that multiply nibbles, and says that the linear's input has codes of at most 4 bits too.
    """
    padded = F.pad(codes, (0, -codes.shape[-1] % (16 if bits > 4 else 32))).contiguous()
    return padded if bits > 4 else pack_int4(padded)


def weight_codes(weight: Tensor, weight_scale: Tensor, channels: int) -> Tensor:
    """Returns int8 codes (…, N, channels) of either layout, which its number of axes tells."""
    if weight.dim() > weight_scale.dim() + 1:
        return unpack_weight(weight, weight_scale.shape[-1], channels)
    codes = unpack_int4(weight, 2 * weight.shape[-1]) if weight.dtype == torch.uint8 else weight
    return codes[..., :channels]
