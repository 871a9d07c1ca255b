"""The base of all fake-quantizers: modes, observations, results in buffers, a scale that can learn.

They compute exactly what the references of `ptq4vm.ops` do, in floating point and with straight-through gradients.
`mode` is a Python attribute, so that nothing synchronises with a device. `convert` hands the integers to torchao.
"""

import contextlib
import enum
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ptq4vm.graph.insert import attribute, set_tensor
from ptq4vm.quantization_specs import IntegerRange


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Silences the warnings of torchao's import, which go through `warnings` and through torch's log."""
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
    """The treatment of a tensor: it is passed on, observed and passed on, or rounded."""

    PASS = "pass"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


class FakeQuantize(FakeQuantizeBase):
    """Mode, name, observations, and a scale that learning multiplies by exp(log_factor).

    All that calibration finds is in the buffers `RESULTS`, which are None before: `state_dict` carries it and
    `load_state_dict` brings it back.
    """

    RESULTS: ClassVar[tuple[str, ...]] = ("scale",)
    OBSERVATIONS: ClassVar[type] = list
    scale: Tensor | None
    observe: Callable[..., None]
    """Adds to the observations."""
    choose_qparams: Callable[..., None]
    """Sets `RESULTS`, from the observations or from what they were made into."""
    quantized: Callable[..., Tensor]
    """Returns the rounded value in floating point."""

    def __init__(self, spec: IntegerRange, **_: Any) -> None:
        super().__init__()
        self.spec = spec
        self.name = ""
        for name in self.RESULTS:
            self.register_buffer(name, None)
        self.reset()

    def reset(self) -> None:
        """Returns to the state before calibration."""
        self.mode = Mode.PASS
        self.log_factor: nn.Parameter | None = None
        for name in self.RESULTS:
            setattr(self, name, None)
        self.forget()

    def forget(self) -> None:
        """Drops the observations, which can be large."""
        self.observations = self.OBSERVATIONS()

    def forward(self, *inputs: Any) -> Tensor:
        if self.mode is Mode.OBSERVE:
            self.observe(*inputs)
        return self.quantized(*inputs) if self.mode is Mode.QUANTIZE else self.original(*inputs)

    def original(self, x: Tensor, smooth: Tensor | None = None) -> Tensor:
        """Returns x, or x · smooth."""
        return x if smooth is None else x * smooth

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point (torchao's name)."""
        assert self.scale is not None
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int32)

    def start_learning(self) -> nn.Parameter:
        """Returns the logarithm of a factor on the scale, one for each of its entries, to be learned."""
        assert self.scale is not None
        self.log_factor = nn.Parameter(torch.zeros_like(self.scale))
        return self.log_factor

    def fold_learned_scale(self) -> None:
        self.scale, self.log_factor = self.learned_scale().detach().clone(), None

    def learned_scale(self) -> Tensor:
        """Returns the scale, with a gradient while it is learned."""
        assert self.scale is not None
        return self.scale if self.log_factor is None else self.scale * torch.exp(self.log_factor)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # a buffer that is None takes no value; one of the stored shape does
        for name in self.RESULTS:
            if (stored := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(stored, device=self.fake_quant_enabled.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _set_tensors(self, model: fx.GraphModule, values: dict[str, Tensor]) -> list[fx.Node]:
        """Registers tensors beside the site that this is named after; returns nodes that read them."""
        return [model.graph.get_attr(set_tensor(model, f"{self.name}.{leaf}", value)) for leaf, value in values.items()]

    def _insert_integers(self, model: fx.GraphModule, node: fx.Node, kind: str, axis: int | None) -> fx.Node:
        """Inserts quantize and dequantize: with two numbers, or with tensors along an axis, named after `kind`."""
        (scale, zero_point), graph = self.calculate_qparams(), model.graph
        rest: tuple[Any, ...] = (*self.spec.bounds, torch.int8)
        if axis is None:
            operators = quantized_decomposed.quantize_per_tensor, quantized_decomposed.dequantize_per_tensor
            qparams: tuple[Any, ...] = (scale.item(), zero_point.item())
        else:
            operators = quantized_decomposed.quantize_per_channel, quantized_decomposed.dequantize_per_channel
            values = {f"{kind}_scale": scale, f"{kind}_zero_point": zero_point}
            qparams = (*self._set_tensors(model, values), axis)
        codes = graph.call_function(operators[0].default, (node.args[0], *qparams, *rest))
        return graph.call_function(operators[1].default, (codes, *qparams, *rest))


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Returns y as x lies in memory, as in the converted graph: other layouts may round products differently."""
    return y if x.is_contiguous() else torch.empty_like(x).copy_(y)


def constant(gm: fx.GraphModule, node: Any) -> Any:
    """Returns the value of a node that depends on parameters alone."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        return attribute(gm, str(node.target))
    assert node.op == "call_function" and callable(node.target), f"{node} is not a constant"
    return node.target(*(constant(gm, arg) for arg in node.args))
