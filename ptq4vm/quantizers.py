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

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion, attribute, replace_node, set_tensor
from ptq4vm.ops import quantization
from ptq4vm.specs import Granularity, IntegerRange


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

OUTPUT = "ptq4vm.output"
"""The key in the meta of a dequantize node that has taken an `OutputFakeQuantize`'s place; its name."""


class Mode(enum.Enum):
    """What a fake-quantizer does with a tensor."""

    PASS = "pass"
    QUANTIZE = "quantize"


class _FakeQuantize(FakeQuantizeBase):
    """Mode, name, and a step size that learning multiplies by exp(log_factor)."""

    scale: Tensor | None

    def __init__(self, spec: IntegerRange) -> None:
        super().__init__()
        self.spec = spec
        self.mode = Mode.PASS
        self.name = ""
        self.tap: Callable[..., None] | None = None
        """Sees what comes in, or, of an input of linears, what goes out."""
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
    """Affine, at the config's granularity; x (B, L, D). The `kept` token stays as it is."""

    zero_point: Tensor | None

    def __init__(self, spec: IntegerRange, granularity: Granularity, kept: int | None = None, **_: Any) -> None:
        super().__init__(spec)
        self.granularity = granularity
        self.kept = kept
        self.follows: str | None = None
        """Name of the `OutputFakeQuantize` whose step sizes serve this input too."""
        self.register_buffer("zero_point", None)

    @property
    def dynamic(self) -> bool:
        return self.granularity is Granularity.PER_TOKEN_DYNAMIC

    @property
    def per_token(self) -> bool:
        """Whether its qparams are a table with those of every token."""
        return self.follows is None and self.granularity.static_per_token

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
            quantization.choose_qparams(x.detach(), None, self.spec.bits)
            if self.dynamic
            else (self.step(), self.zero_point)
        )
        y = ops.fake_quantize(x, scale, zero_point, smooth, self.spec.bits)
        if self.kept is not None:
            row = x[:, self.kept : self.kept + 1]
            y = torch.slice_scatter(y, row if smooth is None else row * smooth, 1, self.kept, self.kept + 1)
        return _laid_out_as(x, y)

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
            elif not self.per_token:
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
            if self.kept is not None:
                where = (1, self.kept, self.kept + 1)
                row = Insertion(model, node).call(torch.ops.aten.slice.Tensor, x, *where)
                result = graph.call_function(torch.ops.aten.slice_scatter.default, (result, row, *where))
        replace_node(node, result)


class OutputFakeQuantize(_FakeQuantize):
    """Symmetric, of what an operator gives; x (B, L, C), or channels first (B, C, H, W), or of any shape per tensor.

    Its step sizes are (1,), one per token (L,), or one per channel (C,).
    """

    def __init__(self, spec: IntegerRange, granularity: Granularity, axis: int, power_of_two: bool, **_: Any) -> None:
        super().__init__(spec)
        self.granularity = granularity
        self.axis = axis
        """Of the tokens or channels that step sizes belong to."""
        self.power_of_two = power_of_two

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        assert self.scale is not None
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.tap is not None:
            self.tap(x.detach())
        if self.mode is not Mode.QUANTIZE:
            return x
        scale, zero_point = self.calculate_qparams()
        if len(scale) == 1:
            return _laid_out_as(x, ops.fake_quantize(x, scale, zero_point, None, self.spec.bits))
        steps = scale.view(-1, *[1] * (x.dim() - 1 - self.axis))
        one, none = torch.ones_like(scale[:1]), torch.zeros_like(zero_point[:1])
        codes = ops.fake_quantize(x * (1.0 / steps), one, none, None, self.spec.bits)
        return _laid_out_as(x, codes * steps)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replaces itself by quantize and dequantize nodes; `lower` knows them by the name in their meta."""
        graph, x, (low, high) = model.graph, node.args[0], self.spec.bounds
        scale_value, zero_value = self.calculate_qparams()
        with graph.inserting_before(node):
            if len(scale_value) == 1:
                rest: tuple[Any, ...] = (scale_value.item(), 0, low, high, torch.int8)
                codes = graph.call_function(quantized_decomposed.quantize_per_tensor.default, (x, *rest))
                result = graph.call_function(quantized_decomposed.dequantize_per_tensor.default, (codes, *rest))
            else:
                scale = graph.get_attr(set_tensor(model, f"{self.name}.output_scale", scale_value))
                zero_point = graph.get_attr(set_tensor(model, f"{self.name}.output_zero_point", zero_value))
                rest = (scale, zero_point, self.axis, low, high, torch.int8)
                codes = graph.call_function(quantized_decomposed.quantize_per_channel.default, (x, *rest))
                result = graph.call_function(quantized_decomposed.dequantize_per_channel.default, (codes, *rest))
        replace_node(node, result)
        result.meta[OUTPUT] = self.name


class ScanFakeQuantize(_FakeQuantize):
    """`ops.selective_scan`, whose hidden state it rounds; step sizes (1,) or one per token (L,)."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        assert self.scale is not None
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int32)

    def forward(self, *inputs: Any) -> Tensor:
        """Of the arguments of `ops.selective_scan`; `tap` sees them."""
        if self.tap is not None:
            self.tap(*inputs)
        if self.mode is not Mode.QUANTIZE:
            return ops.selective_scan(*inputs)
        assert self.scale is not None
        return ops.selective_scan_quantized(*inputs, self.scale, 1.0 / self.scale, self.spec.bits)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replaces itself by the operator."""
        scale_value, graph = self.calculate_qparams()[0], model.graph
        with graph.inserting_before(node):
            scale = graph.get_attr(set_tensor(model, f"{self.name}.state_scale", scale_value))
            inverse = graph.get_attr(set_tensor(model, f"{self.name}.state_inv_scale", 1.0 / scale_value))
            arguments = (*node.args, scale, inverse, self.spec.bits)
            result = graph.call_function(ops.selective_scan_quantized.default, arguments)
        replace_node(node, result)


class WeightFakeQuantize(_FakeQuantize):
    """Symmetric, one step size per output channel; W (N, D), already smoothed, or a convolution's (N, …).

    Codes follow from W and its step size, unless GPTQ has chosen others.
    """

    codes: Tensor | None
    """int8 (N, D), chosen by GPTQ."""

    def __init__(self, spec: IntegerRange, **_: Any) -> None:
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
        return ops.fake_quantize(w.contiguous().flatten(1), self.step(), None, smooth, self.spec.bits).view(w.shape)

    def integers(self, w: Tensor) -> Tensor:
        """The int8 codes (N, D) of w, already smoothed."""
        assert self.scale is not None
        if self.codes is not None:
            return self.codes
        return quantization.quantize_weight(w.contiguous().flatten(1), self.scale, self.spec.bits).view(w.shape)

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
        replace_node(node, result)


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """As x lies in memory, which is how the converted graph has it: other layouts may round products differently."""
    return y if x.is_contiguous() else torch.empty_like(x).copy_(y)


def constant(gm: fx.GraphModule, node: Any) -> Any:
    """The value of a node that depends on parameters alone."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        return attribute(gm, str(node.target))
    assert node.op == "call_function" and callable(node.target), f"{node} is not a constant"
    return node.target(*(constant(gm, arg) for arg in node.args))
