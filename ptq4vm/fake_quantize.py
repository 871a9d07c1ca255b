"""Simulated quantization inside a prepared graph, with learnable step sizes.

Both classes compute exactly what `reference.py` does, in floating point and with straight-through gradients. They
act by a Python attribute, so that nothing synchronises with a device. `convert` hands the integers to torchao.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq4vm import ops, reference
from ptq4vm.config import Granularity, QuantSpec
from ptq4vm.graph import attribute, set_tensor


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """torchao's import warns about itself, through `warnings` and through torch's log."""
    log = logging.getLogger("torch.utils._pytree")
    disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = disabled


with quiet_import():
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

quantized_decomposed = torch.ops.quantized_decomposed


class Mode(enum.Enum):
    """What a fake-quantizer does with a tensor."""

    PASS = "pass"
    QUANTIZE = "quantize"


class _FakeQuantize(FakeQuantizeBase):
    """Mode, name, and a step size that learning multiplies by exp(log_factor)."""

    scale: Tensor | None

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mode = Mode.PASS
        self.name = ""
        self.register_buffer("scale", None)
        self.log_factor: nn.Parameter | None = None

    def start_learning(self) -> nn.Parameter:
        """The logarithm of a factor on the step sizes, one per step size, to be learned."""
        assert self.scale is not None
        self.log_factor = nn.Parameter(torch.zeros_like(self.scale))
        return self.log_factor

    def finish_learning(self) -> None:
        assert self.scale is not None and self.log_factor is not None
        self.scale = self.step().detach().clone()
        self.log_factor = None

    def step(self) -> Tensor:
        """The step size, with a gradient while it is learned."""
        assert self.scale is not None
        return self.scale if self.log_factor is None else self.scale * torch.exp(self.log_factor)


class ActivationFakeQuantize(_FakeQuantize):
    """Affine, at the config's granularity; x (B, L, D)."""

    zero_point: Tensor | None

    def __init__(self, spec: QuantSpec, granularity: Granularity, **_: Any) -> None:
        super().__init__(spec)
        self.granularity = granularity
        self.tap: Callable[[Tensor], None] | None = None
        self.register_buffer("zero_point", None)

    @property
    def dynamic(self) -> bool:
        return self.granularity is Granularity.PER_TOKEN_DYNAMIC

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Static scale (float32) and zero point (int32), each (L,) or, per tensor, (1,)."""
        self.scale, self.zero_point = scale, zero_point

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        assert self.scale is not None and self.zero_point is not None
        return self.scale, self.zero_point

    def forward(self, x: Tensor, smooth: Tensor | None = None) -> Tensor:
        """x · smooth, fake-quantized; `tap` sees what is returned."""
        y = self._forward(x, smooth)
        if self.tap is not None:
            self.tap(y.detach())
        return y

    def _forward(self, x: Tensor, smooth: Tensor | None) -> Tensor:
        if self.mode is not Mode.QUANTIZE or self.dynamic:
            x, smooth = x if smooth is None else x * smooth, None
        if self.mode is not Mode.QUANTIZE:
            return x
        scale, zero_point = (
            reference.choose_qparams(x.detach(), None, self.spec.bits)
            if self.dynamic
            else (self.step(), self.zero_point)
        )
        y = ops.fake_quantize(x, scale, zero_point, smooth, self.spec.bits)
        # as x lies in memory, which is how the converted graph has it: other layouts may round products differently
        return y if x.is_contiguous() else torch.empty_like(x).copy_(y)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replaces itself by quantize and dequantize nodes (torchao calls this from `convert_pt2e`)."""
        graph, x, (low, high) = model.graph, node.args[0], self.spec.bounds
        with graph.inserting_before(node):
            if self.dynamic:
                bits = self.spec.bits
                pair = graph.call_function(ops.choose_qparams.default, (x, None, bits))
                scale = graph.call_function(operator.getitem, (pair, 0))
                zero_point = graph.call_function(operator.getitem, (pair, 1))
                inverse = graph.call_function(torch.ops.aten.reciprocal.default, (scale,))
                codes = graph.call_function(ops.quantize.default, (x, inverse, zero_point, None, bits))
                result = graph.call_function(ops.dequantize.default, (codes, scale, zero_point))
            elif self.granularity is Granularity.PER_TENSOR:
                step, zero = (tensor.item() for tensor in self.calculate_qparams())
                numbers = (step, zero, low, high, torch.int8)
                codes = graph.call_function(quantized_decomposed.quantize_per_tensor.default, (x, *numbers))
                result = graph.call_function(quantized_decomposed.dequantize_per_tensor.default, (codes, *numbers))
            else:
                scale_value, zero_value = self.calculate_qparams()
                scale = graph.get_attr(set_tensor(model, f"{self.name}.input_scale", scale_value))
                zero_point = graph.get_attr(set_tensor(model, f"{self.name}.input_zero_point", zero_value))
                rest = (scale, zero_point, 1, low, high, torch.int8)
                codes = graph.call_function(quantized_decomposed.quantize_per_channel.default, (x, *rest))
                result = graph.call_function(quantized_decomposed.dequantize_per_channel.default, (codes, *rest))
        _replace(node, result)


class WeightFakeQuantize(_FakeQuantize):
    """Symmetric, one step size per output channel; W (N, D), already smoothed.

    Codes follow from W and its step size, unless GPTQ has chosen others.
    """

    codes: Tensor | None
    """int8 (N, D), chosen by GPTQ."""

    def __init__(self, spec: QuantSpec, **_: Any) -> None:
        super().__init__(spec)
        self.register_buffer("codes", None)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        assert self.scale is not None
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int32)

    def forward(self, w: Tensor, smooth: Tensor | None = None) -> Tensor:
        """w · smooth, fake-quantized."""
        if self.mode is not Mode.QUANTIZE:
            return w if smooth is None else w * smooth
        if self.codes is not None:
            return self.codes * self.step().unsqueeze(-1)
        # in one layout before and after conversion: products of transposed memory may round differently
        return ops.fake_quantize(w.contiguous(), self.step(), None, smooth, self.spec.bits)

    def integers(self, w: Tensor) -> Tensor:
        """The int8 codes (N, D) of w, already smoothed."""
        assert self.scale is not None
        if self.codes is not None:
            return self.codes
        return reference.quantize_weight(w.contiguous(), self.scale, self.spec.bits)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replaces itself and the smoothing of the weight by integers and one dequantize node."""
        scale, zero_point = self.calculate_qparams()
        with torch.no_grad():
            integers = self.integers(constant(model, node.args[0]))
        graph, (low, high) = model.graph, self.spec.bounds
        with graph.inserting_before(node):
            codes = graph.get_attr(set_tensor(model, f"{self.name}.weight_q", integers))
            scales = graph.get_attr(set_tensor(model, f"{self.name}.weight_scale", scale))
            zeros = graph.get_attr(set_tensor(model, f"{self.name}.weight_zero_point", zero_point))
            rest = (scales, zeros, 0, low, high, torch.int8)
            result = graph.call_function(quantized_decomposed.dequantize_per_channel.default, (codes, *rest))
        _replace(node, result)


def constant(gm: fx.GraphModule, node: Any) -> Any:
    """The value of a node that depends on parameters alone."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        return attribute(gm, str(node.target))
    assert node.op == "call_function" and callable(node.target), f"{node} is not a constant"
    return node.target(*(constant(gm, arg) for arg in node.args))


def _replace(node: fx.Node, result: fx.Node) -> None:
    result.meta.update({key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta})
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
