"""Lower bounds of a GPU's time: bytes over its bandwidth, products over tensor cores, exponentials over their units.

An operator reads each input once from memory and writes each result once, and takes the larger of its three times; the
bound of a graph is the sum over its operators, with nothing for starting them. Caches make operators faster than that
only where their inputs were written just before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from benchmarks.speed.layers import Category, category


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """Rates of a data sheet, dense; 10⁹ bytes and 10¹² operations a second, a product and its sum being two."""

    bandwidth: float
    half: float
    """float16 and bfloat16 with sums in float32."""
    int8: float
    int4: float | None
    """None where tensor cores do not multiply nibbles: then 4 bits are kept in memory and multiplied as 8."""
    processors: int
    clock: float
    """10⁹ a second."""


GPUS = {
    "RTX 3090": GPU(bandwidth=936, half=71, int8=284, int4=568, processors=82, clock=1.695),
    "RTX 4090": GPU(bandwidth=1008, half=165.2, int8=660.6, int4=1321.2, processors=128, clock=2.52),
    "L40S": GPU(bandwidth=864, half=362, int8=733, int4=1466, processors=142, clock=2.52),
    "A100-SXM4-40GB": GPU(bandwidth=1555, half=312, int8=624, int4=1248, processors=108, clock=1.41),
    "A100": GPU(bandwidth=2039, half=312, int8=624, int4=1248, processors=108, clock=1.41),
    "H100 NVL": GPU(bandwidth=3900, half=835, int8=1671, int4=None, processors=132, clock=1.785),
    "H100 PCIe": GPU(bandwidth=2000, half=756, int8=1513, int4=None, processors=114, clock=1.755),
    "H100": GPU(bandwidth=3350, half=990, int8=1979, int4=None, processors=132, clock=1.83),
    "H200": GPU(bandwidth=4800, half=990, int8=1979, int4=None, processors=132, clock=1.83),
}
"""Keyed by a part of the driver's name for the GPU, the longer ones first."""

EXPONENTIALS = 16
"""Exponentials a cycle that the special function units of a processor compute."""


def known(name: str) -> GPU | None:
    """The GPU of this name, which is the driver's."""
    return next((gpu for part, gpu in GPUS.items() if re.search(rf"\b{part}\b", name)), None)


def linear(gpu: GPU, rows: int, channels: int, features: int, bits: int) -> float:
    """Seconds of one linear with results of 16 bits; inputs and weights of 16, 8 or 4 bits are in memory already."""
    size = bits / 8 * (rows * channels + features * channels) + 2 * rows * features
    return max(size / (1e9 * gpu.bandwidth), 2 * rows * channels * features / (1e12 * _rate(gpu, bits)))


def graph(gpu: GPU, gm: GraphModule, *inputs: Tensor) -> float:
    """Seconds of all operators of a graph on inputs of these shapes; computes nothing."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        bounds = _Bounds(gpu, gm)
        bounds.run(*(mode.from_tensor(tensor) for tensor in inputs))
    return bounds.seconds


class _Bounds(Interpreter):
    def __init__(self, gpu: GPU, gm: GraphModule) -> None:
        super().__init__(gm)
        self.gpu, self.seconds = gpu, 0.0

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.op == "call_function":
            args, _ = self.fetch_args_kwargs_from_env(node)
            self.seconds += operator(self.gpu, node, args, result)
        return result


def operator(gpu: GPU, node: Node, args: Sequence[Any], result: Any) -> float:
    """Seconds of one operator of a graph: those of its memory, its products or its exponentials; none for a view."""
    read, written = _bytes(args), _bytes(result)
    if read.keys() & written.keys():
        return 0.0
    seconds = [(sum(read.values()) + sum(written.values())) / (1e9 * gpu.bandwidth)]
    if category(node) is Category.LINEAR:
        x, weight = [value for value in args if isinstance(value, Tensor) and value.dim() > 1][:2]
        bits = 4 if weight.dtype is torch.uint8 else 8 * x.element_size()
        products = sum(value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)) * x.shape[-1]
        seconds.append(2 * products / (1e12 * _rate(gpu, bits)))
    elif category(node) is Category.SCAN:
        seconds.append(_states(node, args) / EXPONENTIALS / (1e9 * gpu.clock * gpu.processors))  # one a state
    return max(seconds)


def _states(node: Node, args: Sequence[Any]) -> int:
    """Number of states that a scan computes, of all images, tokens, channels and directions."""
    if "directional" not in str(node.target):
        u, _, A = args[:3]
        return int(u.numel() * A.shape[-1])
    u, A, order = args[0], args[11], args[14]
    return int(u.shape[1] * order.shape[1] * A.numel())


def _rate(gpu: GPU, bits: int) -> float:
    """10¹² operations a second."""
    if bits == 4:
        return gpu.int4 or gpu.int8
    return gpu.int8 if bits == 8 else gpu.half


def _bytes(values: Any) -> dict[Any, int]:
    """Bytes by storage: the sum over its different views, but not more than the storage has."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    views = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in tensors}
    sizes: dict[Any, int] = {}
    for (memory, *_), x in views.items():
        size = sizes.get(memory, 0) + x.numel() * x.element_size()
        sizes[memory] = min(size, x.untyped_storage().nbytes())
    return sizes
