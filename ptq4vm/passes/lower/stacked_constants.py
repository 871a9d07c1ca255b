"""Stacks the constants of the K directions of a scan, with per-token values in natural order."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm.graph.insert import Insertion
from ptq4vm.passes.lower.patterns import Quantizer, args, pack_weights, read_constant, read_optional
from ptq4vm.passes.lower.scan_branches import Branch


class StackedConstants:
    """The constants of K directions, stacked, with per-token values in natural order."""

    def __init__(self, gm: GraphModule, branches: list[Branch], tokens: int) -> None:
        self.gm, self.branches, self.tokens = gm, branches, tokens
        self.prefix = str(args(branches[0].dt_linear)[3].target).rpartition(".")[0]

    def name(self, what: str) -> str:
        return f"{self.prefix}.directions_{what}"

    def order(self) -> Tensor:
        """The tokens of each direction, on the device of the other constants."""
        tokens = torch.stack([branch.x.tokens for branch in self.branches])
        return self.branches[0].input.zero_point.new_empty(tokens.shape, dtype=torch.int32).copy_(tokens)

    def natural(self, values: Sequence[Tensor]) -> Tensor:
        """(K, L), or (K, 1) where no direction's values differ between tokens."""
        if all(value.numel() == 1 for value in values):
            return torch.stack([value.view(1) for value in values])
        rows = []
        for branch, value in zip(self.branches, values, strict=True):
            real = branch.x.tokens >= 0
            row = value.new_empty(self.tokens)
            row[branch.x.tokens[real]] = value.expand(len(branch.x.tokens))[real]
            rows.append(row)
        return torch.stack(rows)

    def qparams(self, insert: Insertion, what: str, quantizers: Sequence[Quantizer]) -> tuple[Any, ...]:
        scale = self.natural([quantizer.inv_scale for quantizer in quantizers])
        zero = self.natural([quantizer.zero_point for quantizer in quantizers])
        return (
            insert.tensor(self.name(f"{what}_inv_scale"), scale),
            insert.tensor(self.name(f"{what}_zero_point"), zero),
            self._optional(insert, f"{what}_inv_smooth", [quantizer.inv_smooth for quantizer in quantizers], 1.0),
            quantizers[0].bits,
        )

    def _optional(self, insert: Insertion, what: str, vectors: list[Tensor | None], neutral: float) -> Node | None:
        """Stacks vectors, where one is missing `neutral`; None where all are."""
        given = next((vector for vector in vectors if vector is not None), None)
        if given is None:
            return None
        stacked = [torch.full_like(given, neutral) if vector is None else vector for vector in vectors]
        return insert.tensor(self.name(what), torch.stack(stacked))

    def _constants(self, nodes: Sequence[Any], what: str) -> list[Tensor]:
        return [read_constant(self.gm, node, what) for node in nodes]

    def _biases(self, insert: Insertion, what: str, nodes: Sequence[Any]) -> Node | None:
        return self._optional(insert, what, [read_optional(self.gm, node, what) for node in nodes], 0.0)

    def convolutions(self, insert: Insertion) -> tuple[Node, Node | None]:
        convs = [branch.conv for branch in self.branches if branch.conv is not None]
        weight = torch.stack(self._constants([args(conv)[1] for conv in convs], "a convolution's weight"))
        biases = self._biases(insert, "conv_bias", [args(conv)[2] for conv in convs])
        return insert.tensor(self.name("conv_weight"), weight), biases

    def linear(self, insert: Insertion, what: str, linears: Sequence[Node], scanned: bool = False) -> tuple[Any, ...]:
        """Scales and zero points of the inputs, weight, sums, scales and biases."""
        x = args(linears[0])[0]
        scales, zeros, weights, weight_scales = (
            self._constants([args(linear)[i] for linear in linears], what) for i in (1, 2, 3, 4)
        )
        packed = pack_weights(insert, self.name(what), weights, x, stack=True, scanned=scanned)
        return (
            insert.tensor(self.name(f"{what}_input_scale"), self.natural(scales)),
            insert.tensor(self.name(f"{what}_input_zero_point"), self.natural(zeros)),
            *packed,
            insert.tensor(self.name(f"{what}_scale"), torch.stack(weight_scales)),
            self._biases(insert, f"{what}_bias", [args(linear)[5] for linear in linears]),
        )

    def steps(self, insert: Insertion) -> tuple[Any, ...]:
        """The scan's constants from `step_inv_scale` to D."""
        steps, scans = [branch.dt for branch in self.branches], [branch.scan for branch in self.branches]
        inv_scale, zero_point, inv_smooth, bits = self.qparams(insert, "step", steps)
        linears = [branch.dt_linear for branch in self.branches]
        scale, _, weight, weight_sum, weight_scale, _ = self.linear(insert, "step_linear", linears, scanned=True)
        biases, A = (
            torch.stack(self._constants([args(scan)[i] for scan in scans], what)).float()
            for what, i in (("step_bias", 7), ("A", 2))
        )
        stacked = insert.tensor(self.name("step_bias"), biases), insert.tensor(self.name("A"), A)
        D = self._biases(insert, "D", [args(scan)[5] for scan in scans])
        quantized = (inv_scale, scale, zero_point, inv_smooth, bits, weight, weight_sum, weight_scale)
        return (*quantized, *stacked, D)
