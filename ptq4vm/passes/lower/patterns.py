"""Helpers of the fusing passes: read a lowered graph, rewrite it, record what was fused or left."""

import contextlib
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.backend import native
from ptq4vm.graph.element_numbers import moved_value
from ptq4vm.graph.insert import Insertion, aten, attribute
from ptq4vm.graph.token_order import channels_first, token_map
from ptq4vm.graph.views import scope
from ptq4vm.metadata import FUSIONS
from ptq4vm.ops import layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """One place that was fused, or was left and why."""

    place: str
    """Path of the module around it."""
    pattern: str
    skip_reason: str | None = None
    """None where it was fused."""


class NotFused(Exception):
    """A pattern does not apply; its message is the reason."""


def record_fusion(gm: GraphModule, node: Node, pattern: str, skip_reason: str | None = None) -> None:
    """Adds a place to the list that `fusions` returns."""
    gm.meta[FUSIONS].append(Fusion(place=scope(node) or "the model", pattern=pattern, skip_reason=skip_reason))


@contextlib.contextmanager
def recorded_skip(gm: GraphModule, node: Node, pattern: str) -> Iterator[None]:
    """Ends the body where it raises `NotFused`, and records that the place is left and why."""
    try:
        yield
    except NotFused as reason:
        record_fusion(gm, node, pattern, str(reason))


# --- reading a graph ---


def read_constant(gm: GraphModule, node: Any, what: str) -> Tensor:
    """Value of a parameter or a buffer; raises `NotFused` for anything else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        raise NotFused(f"{what} is computed when the model runs")
    return attribute(gm, str(node.target)).detach()


def read_optional(gm: GraphModule, node: Any, what: str) -> Tensor | None:
    return None if node is None else read_constant(gm, node, what)


def args(node: Node) -> tuple[Any, ...]:
    """Arguments as they are; they are Any to whoever reads them."""
    return node.args


def is_call(node: Any, *targets: Any) -> bool:
    """Returns whether a value is the result of one of these operators."""
    return isinstance(node, Node) and node.target in targets


def only_user(node: Node) -> Node | None:
    """The one reader; None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def same_tokens(node: Node) -> Node:
    """Returns the value before views that keep every token and channel in its place, such as a flatten of (H, W)."""
    while (source := moved_value(node)) is not None:
        found = token_map(node, until=source)
        shape: tuple[Any, ...] = source.meta["val"].shape if isinstance(source.meta.get("val"), Tensor) else ()
        whole = found and found.is_natural(math.prod(shape[1:-1])) and (found.first, found.last) == (0, shape[-1])
        if not whole or channels_first(source) or only_user(source) is not node:
            return node
        node = source
    return node


@dataclass(frozen=True)
class Source:
    """The value whose codes a quantize node makes: x, or x · inv_smooth, or the rotation of one of these."""

    x: Node
    inv_smooth: Node | None
    rotate: Node | None

    @property
    def between(self) -> tuple[Node, ...]:
        """Nodes between x and the quantize node, nearest to it first."""
        if self.rotate is None:
            return ()
        return (self.rotate,) if self.inv_smooth is None else (self.rotate, args(self.rotate)[0])


def source_of(quantize: Node) -> Source:
    """Reads a quantize node of a lowered graph."""
    x, inv_smooth = args(quantize)[0], args(quantize)[3]
    if not is_call(x, ops.rotate.default):
        return Source(x, inv_smooth, None)
    (rotated,) = args(x)
    factor = args(rotated)[1] if is_call(rotated, aten.mul.Tensor) else None
    if isinstance(factor, Node) and str(factor.target).endswith(".inv_smooth"):
        return Source(args(rotated)[0], factor, x)
    return Source(rotated, None, x)


@dataclass(frozen=True)
class Quantizer:
    """A static quantize node's arguments."""

    node: Node
    x: Node
    inv_scale: Tensor
    zero_point: Tensor
    inv_smooth: Tensor | None
    bits: int


def read_quantizer(gm: GraphModule, node: Any) -> Quantizer:
    """Raises `NotFused` for anything but a static quantize node."""
    if not is_call(node, ops.quantize.default):
        raise NotFused("its result is not quantized")
    x, inv_scale, zero_point, inv_smooth, bits = args(node)
    scale = read_constant(gm, inv_scale, "the scale (per-token dynamic)")
    if scale.dim() != 1:
        raise NotFused("its scales are per image")
    zero = read_constant(gm, zero_point, "the zero point")
    return Quantizer(node, x, scale, zero, read_optional(gm, inv_smooth, "the smoothing vector"), bits)


# --- rewriting it ---


def as_tokens(insert: Insertion, node: Node) -> Node:
    """(B, …, D) as (B, L, D)."""
    dim = node.meta["val"].dim()
    return node if dim == 3 else insert.call(aten.flatten.using_ints, node, 1, dim - 2)


def shaped_as(insert: Insertion, node: Node, like: Node) -> Node:
    """(B, L, D) with the token axes of `like`."""
    sizes = list(like.meta["val"].shape[1:-1])
    return node if len(sizes) == 1 else insert.call(aten.unflatten.int, node, 1, sizes)


def pack_weights(
    insert: Insertion, name: str, weights: Sequence[Tensor], x: Node, *, stack: bool = False, scanned: bool = False
) -> tuple[Node, Node]:
    """Constants for linears of the codes x: their codes, and these codes' sums.

    They have the layout of the device that they are on. The other device takes it too, but slowly: a model should be
    moved before it is fused. `scanned` weights, of a scan's steps, have one layout.
    """
    four = weights[0].dtype == torch.uint8
    codes = [layouts.unpack_int4(weight, x.meta["val"].shape[-1]) if four else weight for weight in weights]
    whole = torch.stack(codes) if stack else codes[0]
    capability = None if scanned else capability_of(whole.device)
    if capability is None:
        packed = layouts.pack_weight(whole, 4 if four else 8)
    else:
        nibbles = four and _bits(x) <= 4 and multiplies_nibbles(capability, whole.shape[-2])
        packed = layouts.pad_weight(whole, 4 if nibbles else 8)
    return insert.tensor(f"{name}_packed", packed), insert.tensor(f"{name}_sum", whole.sum(-1, dtype=torch.int32))


def multiplies_nibbles(capability: int, features: int) -> bool:
    """Returns whether a GPU (10 · major + minor) multiplies nibbles faster than bytes, for so many output channels."""
    return 80 <= capability < 90 and features >= NIBBLE_FEATURES


NIBBLE_FEATURES = 640
"""Output channels from which on nibbles save tensor cores more time than it takes to pack the inputs; a bound, for an
RTX 3090 (455) and an A100 (600), not a measurement."""


def capability_of(device: torch.device) -> int | None:
    """Compute capability, as 10 · major + minor; None of a CPU, and of a GPU without native kernels."""
    if device.type != "cuda" or not native.supports(device):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _bits(codes: Node) -> int:
    """Returns the bits of the codes that an operator returns; 8 where the graph does not say."""
    node = same_tokens(codes)
    if is_call(node, operator.getitem):
        node = args(node)[0]
    schema = getattr(node.target, "_schema", None)
    return args(node)[-1] if schema is not None and schema.arguments[-1].name == "bits" else 8
