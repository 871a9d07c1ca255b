"""What is quantized in one piece of a graph: switching it, watching it, keeping and restoring what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.graph.partition import Part
from ptq4vm.ops import scans as scan_ops
from ptq4vm.passes.calibrate.clusters import Statistics
from ptq4vm.passes.calibrate.jlss import Values
from ptq4vm.passes.prepare.bias_correction import correction_of
from ptq4vm.passes.prepare.reparameterize import factors_of
from ptq4vm.passes.quantized import (
    QuantizedConvolution,
    QuantizedLinear,
    QuantizedOutput,
    QuantizedScan,
    quantized_convolutions,
    quantized_outputs,
    quantized_scans,
    tap_inputs,
)
from ptq4vm.quantizers import ActivationFakeQuantize, Mode, OutputFakeQuantize, ScanFakeQuantize

FORWARD_BATCH = 32
"""Images that run through a block at once when nothing is learned."""


class States:
    """Of the states (L, S, E) of one scan: the sum and the maximum of |h| over images, and |h| of a few."""

    def __init__(self) -> None:
        self.total = self.largest = self.sample = torch.zeros(())
        self.count = 0

    def add(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> None:
        """Of the arguments of `ops.selective_scan`."""
        _, _, _, bias, softplus = rest
        sizes = torch.cat([states.abs() for states in scan_ops.scan_states(u, delta, A, B, bias, softplus)])
        self.total = self.total + sizes.sum(1)
        self.count += sizes.shape[1]
        self.largest = torch.maximum(self.largest, sizes.amax(1))
        if not self.sample.dim():
            self.sample = sizes[:, :: max(1, sizes.shape[1] // STATE_IMAGES)].clone()


STATE_IMAGES = 8
"""Images whose states are kept to score truncations, of the first batch."""


@dataclass
class Seen:
    """What quantizers saw: the inputs of linears, piece by piece, and statistics of the outputs."""

    inputs: dict[ActivationFakeQuantize, list[Tensor]]
    outputs: dict[OutputFakeQuantize, Statistics]

    def clear(self) -> None:
        self.inputs.clear()
        self.outputs.clear()


@dataclass(frozen=True)
class Members:
    """The quantized linears, outputs, convolutions and scans of a piece."""

    gm: GraphModule
    linears: Sequence[QuantizedLinear]
    outputs: Sequence[QuantizedOutput]
    convolutions: Sequence[QuantizedConvolution]
    scans: Sequence[QuantizedScan]

    def __bool__(self) -> bool:
        return any((self.linears, self.outputs, self.convolutions, self.scans))

    def inside(self, part: nn.Module) -> Members:
        """Those whose quantizers are in a piece."""
        used = set(part.modules())
        return Members(
            self.gm,
            [linear for linear in self.linears if linear.weight in used],
            [output for output in self.outputs if output.fake in used],
            [convolution for convolution in self.convolutions if convolution.weight in used],
            [scan for scan in self.scans if scan.fake in used],
        )

    def _quantizers(self) -> Iterator[Any]:
        for linear in self.linears:
            yield from (linear.input, linear.weight)
        yield from (convolution.weight for convolution in self.convolutions)
        yield from (output.fake for output in self.outputs)
        yield from (scan.fake for scan in self.scans)

    def set_mode(self, mode: Mode) -> None:
        for quantizer in self._quantizers():
            quantizer.mode = mode

    @torch.no_grad()
    def reset(self) -> None:
        """As `prepare` left them."""
        self.set_mode(Mode.PASS)
        self.untap()
        for quantizer in self._quantizers():
            quantizer.scale = quantizer.log_factor = None
        for linear in self.linears:
            linear.input.zero_point = linear.weight.codes = None
            if linear.smooth is not None:
                linear.smooth.zero_()
        for scan in self.scans:
            for factor in factors_of(self.gm, scan.name).values():
                factor.fill_(1)
        for correction in self._corrections().values():
            correction.zero_()

    def _corrections(self) -> Values:
        names = [linear.name for linear in self.linears] + [convolution.name for convolution in self.convolutions]
        found = {name: correction_of(self.gm, name) for name in names}
        return {f"{name}.bias_correction": value for name, value in found.items() if value is not None}

    def tap(self) -> Seen:
        """What will reach the quantizers until `untap`; some linears share one."""
        statistics = {output.fake: Statistics(output.fake.axis) for output in self.outputs}
        seen = Seen(tap_inputs(self.linears), statistics)
        for fake, found in statistics.items():
            fake.tap = found.add
        return seen

    def tap_states(self) -> dict[ScanFakeQuantize, States]:
        """The states that come until `untap`."""
        states = {scan.fake: States() for scan in self.scans}
        for fake, found in states.items():
            fake.tap = found.add
        return states

    def untap(self) -> None:
        for quantizer in self._quantizers():
            quantizer.tap = None

    def tensors(self) -> Values:
        """All that calibration has found, by name."""
        found: dict[str, Tensor | None] = dict(self._corrections())
        for linear in self.linears:
            found |= {
                f"{linear.name}.input_scale": linear.input.scale,
                f"{linear.name}.input_zero_point": linear.input.zero_point,
                f"{linear.name}.weight_scale": linear.weight.scale,
                f"{linear.name}.weight_codes": linear.weight.codes,
                f"{linear.name}.log_smooth": linear.smooth,
            }
        found |= {f"{output.name}.output_scale": output.fake.scale for output in self.outputs}
        found |= {f"{convolution.name}.weight_scale": convolution.weight.scale for convolution in self.convolutions}
        for scan in self.scans:
            found |= {f"{scan.name}.state_scale": scan.fake.scale} | factors_of(self.gm, scan.name)
        return {name: value.detach() for name, value in found.items() if value is not None}

    @torch.no_grad()
    def restore(self, stored: Values) -> None:
        """Sets what `tensors` gave; `restore_states` comes first."""
        for linear in self.linears:
            linear.weight.scale = stored[f"{linear.name}.weight_scale"]
            if not linear.input.dynamic:
                linear.input.set_qparams(
                    stored[f"{linear.name}.input_scale"], stored[f"{linear.name}.input_zero_point"]
                )
            linear.weight.codes = stored.get(f"{linear.name}.weight_codes")
            if linear.smooth is not None:
                linear.smooth.copy_(stored[f"{linear.name}.log_smooth"])
        for output in self.outputs:
            output.fake.scale = stored[f"{output.name}.output_scale"]
        for convolution in self.convolutions:
            convolution.weight.scale = stored[f"{convolution.name}.weight_scale"]
        for name, correction in self._corrections().items():
            correction.copy_(stored[name])

    @torch.no_grad()
    def restore_states(self, stored: Values) -> None:
        """Of the scans, which change what x_proj gives in floating point too."""
        for scan in self.scans:
            scan.fake.scale = stored[f"{scan.name}.state_scale"]
            for name, factor in factors_of(self.gm, scan.name).items():
                factor.copy_(stored[name])


def members_of(prepared: GraphModule, linears: Sequence[QuantizedLinear]) -> Members:
    """Those of a whole graph."""
    return Members(
        prepared,
        linears,
        quantized_outputs(prepared),
        quantized_convolutions(prepared),
        quantized_scans(prepared),
    )


@torch.no_grad()
def run_part(part: Part, values: Values) -> Values:
    """Its outputs, a batch of images after another."""
    images = len(next(iter(values.values())))
    pieces = [
        part({name: values[name][start : start + FORWARD_BATCH] for name in part.inputs})
        for start in range(0, images, FORWARD_BATCH)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in part.outputs}
