"""Rows of benchmarks/gpu.py: linears and fused operators, each with the other ways to compute the same.

A row has candidates that compute the same from inputs of its own making; ratios are to the first one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks import kernels, one_by_one
from benchmarks.speed import bounds
from benchmarks.speed.bounds import GPU
from benchmarks.speed.graphs import recorded
from ptq4vm import ops
from ptq4vm.ops import layouts, quantization

Call = Callable[[], Any]

BATCHES = (32, 256)
MOST = 512
"""Inputs of a single operator that are kept, where so many fit into the cache."""

CALLS = 20
"""The least number of runs of a single operator in a graph, so that starting the graph does not count."""


@dataclass(frozen=True)
class Setup:
    """Where to measure, what is known of it, and how small everything is to be."""

    device: torch.device
    gpu: GPU | None
    smoke: bool = False
    pieces: dict[Any, Any] = field(default_factory=dict)
    """Quantized blocks, kept for other batches."""

    @property
    def cache(self) -> int:
        """Bytes; a CPU's are not looked at, as there is one set of inputs there."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 0


@dataclass(frozen=True)
class Candidate:
    """Calls that run one after another, on other memory each, so that no cache holds what they read."""

    calls: list[Call]
    bound: float | None = None
    """Seconds of one call."""

    def recorded(self, device: torch.device) -> Call:
        """All of them, as one CUDA graph on a GPU."""

        def run(_: Tensor) -> None:
            for call in self.calls:
                call()

        return recorded(run, torch.zeros(1, device=device))


@dataclass(frozen=True)
class Row:
    suite: str
    name: str
    batch: int
    importance: int
    """Rows with larger numbers are dropped first."""
    candidates: Callable[[Setup], dict[str, Callable[[], Candidate]]]
    """Each is made when it is its turn, so that one that fails leaves the others."""

    @property
    def key(self) -> str:
        return f"{self.suite}, {self.name}, batch {self.batch}"


def cycled(setup: Setup, make: Callable[[], Any], call: Callable[..., Any], bound: float | None) -> Candidate:
    """`call` on as many inputs of `make` as do not fit twice into the cache."""
    with torch.device(setup.device):
        first = make()
    size = sum(value.nbytes for value in tree_leaves(first) if isinstance(value, Tensor))
    sets = min(MOST, max(1, math.ceil(2 * setup.cache / max(1, size)))) if setup.cache else 1
    with torch.device(setup.device):
        inputs = [first, *(make() for _ in range(sets - 1))]
    times = math.ceil(CALLS / sets) if setup.cache else 1
    calls: list[Call] = [functools.partial(call, *arguments) for _ in range(times) for arguments in inputs]
    return Candidate(calls, bound)


# --- linears ---

VIM, MAPS = 197, 196
LINEARS = (
    *(
        (f"Vim-{size} {name}", VIM, *shape)
        for size, D, R in (("Ti", 192, 12), ("S", 384, 24), ("B", 768, 48))
        for name, shape in (
            ("in_proj", (D, 4 * D)), ("x_proj", (2 * D, R + 32)), ("dt_proj", (R, 2 * D)), ("out_proj", (2 * D, D)),
        )
    ),
    ("VMamba-T s0 fc1", 3136, 96, 384),
    ("VMamba-T s0 fc2", 3136, 384, 96),
    ("VMamba-T s2 in/out_proj", MAPS, 384, 384),
    ("VMamba-T s2 fc1", MAPS, 384, 1536),
    ("VMamba-T s2 fc2", MAPS, 1536, 384),
    ("VMamba-B s2 in/out_proj", MAPS, 512, 512),
    ("VMamba-B s2 fc1", MAPS, 512, 2048),
    ("VMamba-B s2 fc2", MAPS, 2048, 512),
)  # fmt: skip
"""Name, tokens, channels in and out."""


def linear_row(name: str, tokens: int, channels: int, features: int, batch: int) -> Row:
    def candidates(setup: Setup) -> dict[str, Callable[[], Candidate]]:
        images = 2 if setup.smoke else batch
        x_shape = (images, 17 if setup.smoke else tokens, channels)
        rows = images * x_shape[1]

        def bound(bits: int) -> float | None:
            return bounds.linear(setup.gpu, rows, channels, features, bits) if setup.gpu else None

        def floats(dtype: torch.dtype) -> Candidate:
            make = lambda: (torch.randn(x_shape, dtype=dtype), torch.randn(features, channels, dtype=dtype))  # noqa: E731
            return cycled(setup, make, F.linear, bound(16))

        def codes(bits: int, scales: int) -> tuple[Any, ...]:
            return (*activations(x_shape, bits, scales), *weights(features, channels, bits, setup.device))

        def packed(bits: int, scales: int) -> Candidate:
            call = lambda *arguments: ops.linear_packed(*arguments, None, torch.bfloat16)  # noqa: E731
            return cycled(setup, lambda: codes(bits, scales), call, bound(bits))

        def unfused(x: Tensor, _: Tensor, scale: Tensor, zero: Tensor, *weight: Tensor) -> Tensor:
            x_q = ops.quantize(x, scale.reciprocal(), zero, None, 8)
            return ops.linear_packed(x_q, scale, zero, *weight, None, torch.bfloat16)

        def dynamic(x: Tensor, _: Tensor, __: Tensor, ___: Tensor, *weight: Tensor) -> Tensor:
            scale, zero = ops.choose_qparams(x, None, 8)
            x_q = ops.quantize(x, scale.reciprocal(), zero, None, 8)
            return ops.linear_packed(x_q, scale, zero, *weight, None, torch.bfloat16)

        def with_floats() -> tuple[Any, ...]:
            return (torch.randn(x_shape, dtype=torch.bfloat16), *codes(8, x_shape[1]))

        return {
            "bf16": lambda: floats(torch.bfloat16),
            "fp16": lambda: floats(torch.float16),
            "W8A8 per token": lambda: packed(8, x_shape[1]),
            "W8A8 per tensor": lambda: packed(8, 1),
            "W8A8 quantized apart": lambda: cycled(setup, with_floats, unfused, None),
            "W8A8 dynamic": lambda: cycled(setup, with_floats, dynamic, None),
            "W4A4 per token": lambda: packed(4, x_shape[1]),
        }

    return Row("linears", f"{name} {channels}→{features}", batch, 10 if batch == BATCHES[0] else 30, candidates)


def activations(shape: tuple[int, ...], bits: int, scales: int) -> tuple[Tensor, ...]:
    """Codes, scales and zero points."""
    half = 2 ** (bits - 1)
    zero_point = torch.randint(-half // 2, half // 2, (scales,), dtype=torch.int32)
    return torch.randint(-half, half, shape, dtype=torch.int8), torch.rand(scales) / half + 0.01, zero_point


def weights(features: int, channels: int, bits: int, device: torch.device) -> tuple[Tensor, ...]:
    """As `fuse` arranges them for this device: their memory, sums and scales."""
    from ptq4vm.passes.lower.patterns import capability_of, multiplies_nibbles

    half = 2 ** (bits - 1)
    codes = torch.randint(1 - half, half, (features, channels), dtype=torch.int8)
    capability = capability_of(device)
    if capability is None:
        packed = layouts.pack_weight(codes, bits)
    else:
        packed = layouts.pad_weight(codes, 4 if bits == 4 and multiplies_nibbles(capability, features) else 8)
    return packed, codes.sum(-1, dtype=torch.int32), torch.rand(features) / half


# --- fused operators ---


def operator_cases(batch: int, smoke: bool) -> dict[str, tuple[Callable, Callable, Callable[[], tuple]]]:
    """Name → fused operator, the same one by one, and what makes arguments."""
    few = {"tokens": 16, "side": 4} if smoke else {}
    images = 2 if smoke else batch

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(images, *shape, dtype=dtype)

    def codes_of(tokens: int, channels: int, directions: int = 0) -> tuple[Any, ...]:
        lead = (directions,) if directions else ()
        return (
            20 * torch.rand(*lead, tokens),
            torch.zeros(*lead, tokens, dtype=torch.int32),
            torch.rand(*lead, channels),
            8,
        )

    def norm(tokens: int, channels: int, rms: bool) -> tuple[Any, ...]:
        tokens = few.get("tokens", tokens)
        terms = (normal(tokens, channels), normal(tokens, channels, dtype=torch.float32))
        scale = (torch.rand(channels), None if rms else torch.rand(channels))
        return (*terms, *scale, 1e-5, rms, False, *codes_of(tokens, channels))

    def conv1d(tokens: int, channels: int) -> tuple[Any, ...]:
        tokens = few.get("tokens", tokens)
        order = torch.stack((torch.arange(tokens), torch.arange(tokens).flip(0))).int()
        x = normal(tokens, 2 * channels)[..., :channels]
        return (x, torch.randn(2, channels, 4), torch.randn(2, channels), order, *codes_of(tokens, channels, 2))

    def conv2d(side: int, channels: int) -> tuple[Any, ...]:
        side = few.get("side", side)
        maps = normal(side * side, channels)
        codes = codes_of(side * side, channels, 4)
        return (maps, torch.randn(channels, 3, 3), torch.randn(channels), side, side, *codes[:2], None, 8)

    def scan(merged: bool, **sizes: int) -> tuple[Any, ...]:
        inputs, codes = kernels.directional(**(sizes | few | ({} if sizes["side"] else {"side": 0})), images=images)
        inputs = (
            inputs[0].bfloat16(),
            *inputs[1:13],
            None if inputs[13] is None else inputs[13].bfloat16(),
            inputs[14],
        )
        return (*inputs, True, 1.0) if merged else (*inputs, 0.5, *codes)

    def gelu(tokens: int, channels: int, features: int) -> tuple[Any, ...]:
        shape = (images, few.get("tokens", tokens), channels)
        weight = weights(features, channels, 8, torch.get_default_device())
        return (*activations(shape, 8, shape[1]), *weight, torch.randn(features), False, *codes_of(shape[1], features))

    def plain(tokens: int, channels: int, *, gelu: bool = False) -> tuple[Any, ...]:
        tokens = few.get("tokens", tokens)
        return (normal(tokens, channels), *((gelu,) if gelu else ()), *codes_of(tokens, channels))

    vim = {"directions": 2, "side": 0, "tokens": VIM, "channels": 1536, "rank": 48, "states": 16}
    maps = {"directions": 4, "side": 14, "tokens": MAPS, "channels": 512, "rank": 32, "states": 1}
    return {
        "Vim-B norm": (ops.norm_quantize, one_by_one.norm_one_by_one, lambda: norm(VIM, 768, True)),
        "VMamba-B s2 norm": (ops.norm_quantize, one_by_one.norm_one_by_one, lambda: norm(MAPS, 512, False)),
        "Vim-B convolutions": (ops.conv1d_quantize, one_by_one.conv1d_one_by_one, lambda: conv1d(VIM, 1536)),
        "VMamba-B s0 convolution": (ops.conv2d_quantize, one_by_one.conv2d_one_by_one, lambda: conv2d(56, 128)),
        "Vim-B scan, N=16": (ops.directional_scan_quantize, one_by_one.scan_one_by_one, lambda: scan(False, **vim)),
        "VMamba-B s2 scan, N=1": (
            ops.directional_scan,
            lambda *arguments: one_by_one.unmerged(*arguments[:-2], arguments[-1]),
            lambda: scan(True, **maps),
        ),
        "VMamba-B s2 fc1 + GELU": (ops.linear_gelu_quantize, one_by_one.gelu_one_by_one, lambda: gelu(MAPS, 512, 2048)),
        "Vim-B quantize": (ops.quantize, quantization.quantize, lambda: plain(VIM, 1536)),
        "VMamba-B s2 GELU + rotate": (
            ops.rotate_quantize,
            one_by_one.rotate_one_by_one,
            lambda: plain(MAPS, 2048, gelu=True),
        ),
    }


def operator_row(name: str, batch: int) -> Row:
    def candidates(setup: Setup) -> dict[str, Callable[[], Candidate]]:
        ours, theirs, make = operator_cases(batch, setup.smoke)[name]
        return {
            "one by one": lambda: cycled(setup, make, theirs, None),
            "fused": lambda: cycled(setup, make, ours, operator_bound(setup, ours, make)),
        }

    return Row("operators", name, batch, 12 if batch == BATCHES[0] else 50, candidates)


def operator_bound(setup: Setup, operator: Any, make: Callable[[], tuple]) -> float | None:
    if setup.gpu is None:
        return None
    with torch.device(setup.device):
        arguments = make()
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(f"x{i}") if isinstance(x, Tensor) else x for i, x in enumerate(arguments)]
    graph.output(graph.call_function(operator.default, tuple(inputs)))
    return bounds.graph(
        setup.gpu, torch.fx.GraphModule(nn.Module(), graph), *(x for x in arguments if isinstance(x, Tensor))
    )
