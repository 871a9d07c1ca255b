"""Times every operator of a graph by itself, several graphs in turn."""

from __future__ import annotations

import enum
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ptq4vm.benchmark.timing import WARMUP
from ptq4vm.graph.views import parameter_of, scope


class Category(enum.StrEnum):
    LINEAR = "linear"
    SCAN = "scan"
    CONV = "conv"
    NORM = "norm"
    LAYOUT = "layout"
    """Operators that move, copy, cast or only view."""
    QUANTIZE = "quantize"
    OTHER = "other"
    """Elementwise operators and reductions."""


_NAMES = {
    Category.LINEAR: "linear matmul bmm mm addmm linear_packed linear_gelu_quantize",
    Category.SCAN: "selective_scan selective_scan_quantized directional_scan directional_scan_quantize",
    Category.CONV: "conv1d conv2d causal_conv1d conv1d_quantize conv2d_quantize",
    Category.NORM: "layer_norm rms_norm batch_norm group_norm norm_quantize",
    Category.LAYOUT: (
        "cat stack flip roll pad index permute transpose t reshape view flatten unflatten contiguous clone expand "
        "select slice split split_with_sizes chunk unbind squeeze unsqueeze to copy alias getitem"
    ),
    Category.QUANTIZE: (
        "quantize rotate rotate_quantize gate_quantize choose_qparams dequantize fake_quantize quantize_per_tensor "
        "quantize_per_channel dequantize_per_tensor dequantize_per_channel"
    ),
    Category.OTHER: (
        "add sub mul div neg exp reciprocal sigmoid silu gelu softplus softmax mean sum dropout sym_size check_input"
    ),
}
CATEGORIES = {name: category for category, names in _NAMES.items() for name in names.split()}
"""The category of an operator's name, in any library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One operator of a graph."""

    name: str
    """The weight of a linear or a convolution, else the module that calls the operator."""
    node: str
    op: str
    """Its name without library and overload."""
    category: Category
    seconds: float
    share: float
    """The part of the whole graph's time."""
    gops: float | None
    """A linear's 10⁹ operations a second; a product and its sum are two."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"category": str(self.category)}


def category(node: Node) -> Category:
    """Returns `other` for an operator that is not known (`is_known`)."""
    return CATEGORIES.get(_op(node), Category.OTHER)


def is_known(node: Node) -> bool:
    return _op(node) in CATEGORIES


def profile(
    graphs: Mapping[str, GraphModule],
    inputs: Tensor,
    *,
    warmup: int = WARMUP,
    repeats: int = 20,
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, list[Layer]]:
    """Returns the layers of each graph in its order, medians over the rounds; graphs take turns.

    With one thread it is CPU time, as in `compare`. `tick` is called after every run of a graph.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    runs = {name: _Timed(gm, clock) for name, gm in graphs.items()}
    with torch.inference_mode():
        for number in range(warmup + repeats):
            for run in runs.values():
                if number == warmup:
                    run.seconds.clear()
                run.run(inputs)
                tick()
    return {name: run.layers() for name, run in runs.items()}


def totals(layers: Iterable[Layer]) -> dict[Category, float]:
    """Seconds of each category, all of them."""
    sums = dict.fromkeys(Category, 0.0)
    for layer in layers:
        sums[layer.category] += layer.seconds
    return sums


class _Timed(Interpreter):
    """Times the call of each function alone, without what the interpreter does around it."""

    def __init__(self, gm: GraphModule, clock: Callable[[], float]) -> None:
        super().__init__(gm)
        self.clock = clock
        self.seconds: dict[Node, list[float]] = {}
        self.operations: dict[Node, int] = {}
        self._node: Node | None = None

    def run_node(self, node: Node) -> Any:
        self._node = node
        return super().run_node(node)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = self.clock()
        result = target(*args, **kwargs)
        passed = self.clock() - start
        node = self._node
        assert node is not None
        self.seconds.setdefault(node, []).append(passed)
        if category(node) is Category.LINEAR:
            self.operations[node] = 2 * result.numel() * args[0].shape[-1]
        return result

    def layers(self) -> list[Layer]:
        medians = {node: statistics.median(values) for node, values in self.seconds.items()}
        whole = sum(medians.values()) or 1.0
        return [
            Layer(
                name=_label(node),
                node=node.name,
                op=_op(node),
                category=category(node),
                seconds=seconds,
                share=seconds / whole,
                gops=1e-9 * self.operations[node] / seconds if node in self.operations and seconds else None,
            )
            for node, seconds in medians.items()
        ]


def _op(node: Node) -> str:
    """Returns `linear` for `aten.linear.default`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def _label(node: Node) -> str:
    if category(node) in (Category.LINEAR, Category.CONV):
        names = (parameter_of(argument) or "" for argument in node.all_input_nodes)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            if "weight" in leaf:
                return owner if owner and leaf.startswith("weight") else name
    return scope(node) or node.name
