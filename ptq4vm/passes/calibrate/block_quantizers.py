"""The quantizers of one block: switched together, and their results as the block's part of the `state_dict`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ptq4vm.graph.partition import Block, NamedTensors
from ptq4vm.passes.prepare.bias_correction import CORRECTION
from ptq4vm.passes.prepare.reparameterize import B_FACTOR, C_FACTOR, CHANNELS, INVERSE_CHANNELS
from ptq4vm.passes.quantized_nodes import (
    QuantizedConvolution,
    QuantizedLinear,
    QuantizedOutput,
    QuantizedScan,
    quantized_convolutions,
    quantized_linears,
    quantized_outputs,
    quantized_scans,
)
from ptq4vm.quantizers import ActivationFakeQuantize, FakeQuantize, Mode, WeightFakeQuantize

FORWARD_BATCH = 32
"""Images that run through a block at once when nothing is learned."""

FACTORS = dict.fromkeys((CHANNELS, INVERSE_CHANNELS, B_FACTOR, C_FACTOR), 1.0)
NEUTRAL = {"log_smooth": 0.0, CORRECTION: 0.0, **FACTORS}
"""Tensors beside a linear, a convolution or a scan that calibration sets, and their value before."""

RESULTS = {*NEUTRAL, *ActivationFakeQuantize.RESULTS, *WeightFakeQuantize.RESULTS}
"""Last names of all tensors that calibration sets."""


@dataclass(frozen=True)
class BlockQuantizers:
    """The quantized linears, outputs, convolutions and scans of a block of a prepared graph."""

    prepared: GraphModule
    block: Block
    linears: Sequence[QuantizedLinear]
    outputs: Sequence[QuantizedOutput]
    convolutions: Sequence[QuantizedConvolution]
    scans: Sequence[QuantizedScan]

    @classmethod
    def of(cls, prepared: GraphModule, block: Block) -> BlockQuantizers:
        """Finds them in a block, by its sites."""
        module = block.module
        others = quantized_outputs(module), quantized_convolutions(module), quantized_scans(module)
        return cls(prepared, block, quantized_linears(module), *others)

    def __bool__(self) -> bool:
        return any(self._modules())

    def _modules(self) -> Iterator[FakeQuantize]:
        return (module for module in self.block.module.modules() if isinstance(module, FakeQuantize))

    def set_mode(self, mode: Mode) -> None:
        for module in self._modules():
            module.mode = mode

    def run(self, values: NamedTensors, mode: Mode) -> NamedTensors:
        self.set_mode(mode)
        return run_block(self.block, values)

    def observe(self, values: NamedTensors, quantizers: Iterable[FakeQuantize]) -> NamedTensors:
        """Runs the block in floating point while some of its quantizers observe."""
        self.set_mode(Mode.PASS)
        for quantizer in quantizers:
            quantizer.mode = Mode.OBSERVE
        return run_block(self.block, values)

    def forget(self) -> None:
        """Drops all observations."""
        for module in self._modules():
            module.forget()

    def state(self) -> NamedTensors:
        """Returns all that calibration sets in the block: that part of the prepared graph's `state_dict`."""
        modules, sites = set(self._modules()), (self.linears, self.convolutions, self.scans)
        owners = {path for path, module in self.prepared.named_modules() if module in modules}
        owners |= {site.name for each in sites for site in each}
        wanted = {f"{owner}.{leaf}" for owner in owners for leaf in RESULTS}
        return {path: value for path, value in self.prepared.state_dict().items() if path in wanted}

    def restore(self, state: NamedTensors, float_inputs: NamedTensors) -> NamedTensors:
        """Loads what `state` returned; returns the block's outputs in floating point, as `collect` did.

        The scans' factors come before, since they change what x_proj returns, and the smoothing after.
        """
        factors = {path: value for path, value in state.items() if path.rpartition(".")[2] in FACTORS}
        self.prepared.load_state_dict(factors, strict=False)
        outputs = self.run(float_inputs, Mode.PASS)
        self.prepared.load_state_dict(state, strict=False)
        return outputs

    def reset(self) -> None:
        """Returns to the state that `prepare` left."""
        for path, value in self.state().items():
            if (leaf := path.rpartition(".")[2]) in NEUTRAL:
                value.fill_(NEUTRAL[leaf])
        for module in self._modules():
            module.reset()


@torch.no_grad()
def run_block(block: Block, values: NamedTensors) -> NamedTensors:
    """Returns the block's outputs, computed for one batch of images after another."""
    images = len(next(iter(values.values())))
    pieces = [
        block({name: values[name][start : start + FORWARD_BATCH] for name in block.inputs})
        for start in range(0, images, FORWARD_BATCH)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in block.outputs}
