"""A model as a stem, blocks and a head, so that blocks that are alike are quantized and compiled once.

A whole model takes minutes to capture and to compile, its distinct blocks seconds. The kernels are those of the whole
model: a block is given the last one's addition to the residual stream, (hidden, residual), and adds it itself, where a
norm follows that it is fused with. Shapes: hidden and residual are (B, L, D), or (B, H, W, C) in hierarchical models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm import ops
from ptq4vm.graph.pipeline import clean_up

Stream = tuple[Tensor, Tensor]


class MapBlock(nn.Module):
    """A block of a hierarchical model, as one that carries the residual beside it."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.op, self.norm2, self.mlp = block.norm, block.op, block.norm2, block.mlp

    def forward(self, hidden: Tensor, residual: Tensor) -> Stream:
        residual = residual + hidden
        residual = residual + self.op(self.norm(residual))
        return self.mlp(self.norm2(residual)), residual


class _Zeros(nn.Module):
    """A residual of nothing, kept for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: Tensor | None = None

    def like(self, x: Tensor) -> Tensor:
        if self._kept is None or self._kept.shape != x.shape or self._kept.dtype != x.dtype:
            self._kept = torch.zeros_like(x)
        return self._kept


class _Stem(_Zeros):
    """Images → stream: everything before the first block of a model of one size of map."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed, self.cls_index = model.patch_embed, model.pos_embed, model.cls_index
        self.cls_token = None if self.cls_index is None else model.cls_token

    def forward(self, images: Tensor) -> Stream:
        hidden = self.patch_embed(images)
        if self.cls_token is not None:
            cls = self.cls_token.expand(len(images), -1, -1)
            hidden = torch.cat((hidden[:, : self.cls_index], cls, hidden[:, self.cls_index :]), dim=1)
        hidden = hidden + self.pos_embed
        return hidden, self.like(hidden)


class _MapStem(_Zeros):
    """The patches of a hierarchical model."""

    def __init__(self, patch_embed: nn.Module) -> None:
        super().__init__()
        self.patch_embed = patch_embed

    def forward(self, images: Tensor) -> Stream:
        hidden = self.patch_embed(images)
        return hidden, self.like(hidden)


class _Downsample(_Zeros):
    def __init__(self, downsample: nn.Module) -> None:
        super().__init__()
        self.downsample = downsample

    def forward(self, hidden: Tensor, residual: Tensor) -> Stream:
        hidden = self.downsample((residual + hidden).to(_dtype(self.downsample)))
        return hidden, self.like(hidden)


class _Head(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_f, self.head, self.cls_index = model.norm_f, model.head, model.cls_index

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        x = self.norm_f((residual + hidden).to(_dtype(self.head)))
        return self.head(x.mean(1) if self.cls_index is None else x[:, self.cls_index])


class _MapHead(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.classifier((residual + hidden).to(_dtype(self.classifier)))


class Assembled(nn.Module):
    """Images → logits, piece by piece."""

    def __init__(self, pieces: list[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    def forward(self, images: Tensor) -> Tensor:
        first, *rest = self.pieces
        stream = first(images)
        for piece in rest:
            stream = piece(*stream)
        return stream


class Pieces:
    """A Vim or a VMamba taken apart; `blocks` has the place of one block of each kind in `pieces`."""

    def __init__(self, model: Any) -> None:
        """Raises ValueError for a model that has other pieces."""
        if getattr(model, "rope", None) is not None or not hasattr(model, "layers"):
            raise ValueError(f"{type(model).__name__} has other pieces than a Vim or a VMamba")
        if hasattr(model, "norm_f"):
            self.pieces: list[nn.Module] = [_Stem(model), *model.layers, _Head(model)]
        else:
            self.pieces = [_MapStem(model.patch_embed)]
            for stage in model.layers:
                self.pieces += map(MapBlock, stage.blocks)
                if not isinstance(stage.downsample, nn.Identity):
                    self.pieces.append(_Downsample(stage.downsample))
            self.pieces.append(_MapHead(model.classifier))
        kinds = [_kind(piece) for piece in self.pieces]
        self._first = [kinds.index(kind) for kind in kinds]
        quantized = [i for i, piece in enumerate(self.pieces) if not isinstance(piece, _FLOAT)]
        self.blocks = tuple(i for i in quantized if self._first[i] == i)

    def count(self, block: int) -> int:
        """Number of blocks that are alike."""
        return self._first.count(block)

    def ends(self, place: int) -> bool:
        """Whether no block follows: the next piece reads the stream itself, in no norm that is fused with the sum."""
        return isinstance(self.pieces[place + 1], _FLOAT)

    def streams(self, images: Tensor) -> dict[int, Stream]:
        """Returns the inputs of each of `blocks` for some images."""
        found: dict[int, Stream] = {}
        with torch.no_grad():
            stream = self.pieces[0](images)
            for i, piece in enumerate(self.pieces[1:-1], start=1):
                if i in self.blocks:
                    found[i] = stream
                stream = piece(*stream)
        return found

    def copy(self, place: int) -> nn.Module:
        return copy.deepcopy(self.pieces[place])

    def assemble(self, dtype: torch.dtype, block: Callable[[int, int], nn.Module]) -> Assembled:
        """Puts copies together: stem, head and downsampling in `dtype`, blocks as `block` makes them.

        `block` is given a block's place and the place in `blocks` of the one that is alike, and returns one with
        weights of its own, which a GPU must read.
        """
        made = [
            block(i, first) if first in self.blocks else self.copy(i).to(dtype) for i, first in enumerate(self._first)
        ]
        return Assembled(made).eval().requires_grad_(False)


_FLOAT = (_Zeros, _Head, _MapHead)
"""Pieces that are not quantized."""


def write_branch(fused: GraphModule, dtype: torch.dtype) -> GraphModule:
    """Sets the type of a fused block's addition to the stream to its type in a whole model; in place."""
    output = next(node for node in reversed(fused.graph.nodes) if node.op == "output")
    for node in fused.graph.find_nodes(op="call_function", target=ops.linear_packed.default):
        readers = list(node.users)
        while len(readers) == 1 and readers[0] is not output and "flatten" in str(readers[0].target):
            readers = list(readers[0].users)
        if readers == [output]:
            node.args = (*node.args[:-1], dtype)
    return clean_up(fused)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _kind(piece: nn.Module) -> tuple[Any, ...]:
    """Returns equal keys for pieces that differ in the values of their weights alone."""
    return type(piece).__name__, tuple((name, tuple(value.shape)) for name, value in piece.state_dict().items())
