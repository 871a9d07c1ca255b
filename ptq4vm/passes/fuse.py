"""Producers that quantize: what makes an activation also writes its codes, and scans move no tokens.

    norm (and the residual sum before it) (→ rotate) → quantize  ⇒ norm_quantize
    moved tokens → causal convolution → SiLU → quantize, K times ⇒ conv1d_quantize
    depth-wise 2-D convolution → SiLU → moved → quantize, K times ⇒ conv2d_quantize
    linear → GELU → quantize                                     ⇒ linear_gelu_quantize
    (GELU →) rotate → quantize                                   ⇒ rotate_quantize
    projection → step → scan, K directions, gate, sum, quantize  ⇒ linear_packed and directional_scan(_quantize)
    linear                                                       ⇒ linear_packed

The result computes the same integers up to rounding ties, has its weights in the kernels' layout, and is made to run,
not to be saved. Patterns are found by operators and by where tokens come from, never by a model's name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import fused, ops, reference
from ptq4vm.graph import Insertion, Pipeline, aten, attribute, scope, value_of
from ptq4vm.passes.fold import drop_unused_tensors, fold_constants
from ptq4vm.passes.tokens import TokenMap, channels_first, moves_tokens, token_map

_KEY = "ptq4vm.fusions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """One place that was fused, or was left and why."""

    place: str
    """Path of the module around it."""
    pattern: str
    left: str | None = None
    """Why it was left; None where it was fused."""


class _Left(Exception):
    """A pattern does not apply; its message is the reason."""


def fusions(gm: GraphModule) -> tuple[Fusion, ...]:
    """What `fuse` did to a graph, in order; empty for any other graph."""
    return tuple(gm.meta.get(_KEY, ()))


def fuse(gm: GraphModule, activations: torch.dtype = torch.float32) -> GraphModule:
    """Fuses a lowered graph, in place. Values that depend on parameters alone are folded first.

    With `activations=torch.bfloat16` the activations between fused operators take half the memory and lose precision:
    then codes differ from the unfused graph's wherever a rounding to bfloat16 crosses their border. Raises ValueError
    for any other type than these two.
    """
    if activations not in (torch.float32, torch.bfloat16):
        raise ValueError(f"activations are torch.float32 or torch.bfloat16, got {activations}")
    gm.meta[_KEY] = []
    gm = _FUSE(gm)
    return Pipeline((_halve, drop_unused_tensors))(gm) if activations is torch.bfloat16 else gm


def _note(gm: GraphModule, node: Node, pattern: str, left: str | None = None) -> None:
    gm.meta[_KEY].append(Fusion(place=scope(node) or "the model", pattern=pattern, left=left))


def _drop_identities(gm: GraphModule) -> GraphModule:
    """Dropout in evaluation mode, and casts to the type a value has."""
    for node in gm.graph.nodes:
        cast = node.target is aten.to.dtype and _args(node)[0].meta["val"].dtype is _args(node)[1]
        if cast or (node.target is aten.dropout.default and not _args(node)[2]):
            _swap(gm, node, _args(node)[0])
    return gm


# --- reading a graph ---


def _constant(gm: GraphModule, node: Any, what: str) -> Tensor:
    if not isinstance(node, Node) or node.op != "get_attr":
        raise _Left(f"{what} is computed when the model runs")
    return attribute(gm, str(node.target)).detach()


def _optional(gm: GraphModule, node: Any, what: str) -> Tensor | None:
    return None if node is None else _constant(gm, node, what)


def _args(node: Node) -> tuple[Any, ...]:
    """Arguments as they are; they are Any to whoever reads them."""
    return node.args


def _arguments(node: Node) -> tuple[Any, ...]:
    """All arguments in the order of the schema, with the defaults of those left out."""
    target: Any = node.target
    schema = target._schema.arguments
    return tuple(
        _args(node)[i] if i < len(_args(node)) else node.kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(schema)
    )


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.target in targets


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _same_tokens(node: Node) -> Node:
    """What a value is before views that keep every token and channel in its place, such as a flatten of (H, W)."""
    while moves_tokens(node) and len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        found = token_map(node, until=source)
        shape: tuple[Any, ...] = source.meta["val"].shape if isinstance(source.meta.get("val"), Tensor) else ()
        whole = found and found.is_natural(math.prod(shape[1:-1])) and (found.first, found.last) == (0, shape[-1])
        if not whole or channels_first(source) or _only_user(source) is not node:
            return node
        node = source
    return node


def _as_tokens(insert: Insertion, node: Node) -> Node:
    """(B, …, D) as (B, L, D)."""
    dim = node.meta["val"].dim()
    return node if dim == 3 else insert.call(aten.flatten.using_ints, node, 1, dim - 2)


def _shaped_as(insert: Insertion, node: Node, like: Node) -> Node:
    """(B, L, D) with the token axes of `like`."""
    sizes = list(like.meta["val"].shape[1:-1])
    return node if len(sizes) == 1 else insert.call(aten.unflatten.int, node, 1, sizes)


@dataclass(frozen=True)
class _Quantizer:
    """A static quantize node's arguments."""

    node: Node
    x: Node
    inv_scale: Tensor
    zero_point: Tensor
    inv_smooth: Tensor | None
    bits: int


def _quantizer(gm: GraphModule, node: Any) -> _Quantizer:
    if not _is(node, ops.quantize.default):
        raise _Left("its result is not quantized")
    x, inv_scale, zero_point, inv_smooth, bits = _args(node)
    scale = _constant(gm, inv_scale, "the scale (per-token dynamic)")
    if scale.dim() != 1:
        raise _Left("its scales are per image")
    zero = _constant(gm, zero_point, "the zero point")
    return _Quantizer(node, x, scale, zero, _optional(gm, inv_smooth, "the smoothing vector"), bits)


# --- linears ---


def _packed(insert: Insertion, name: str, weights: Sequence[Tensor], channels: int, stack: bool) -> tuple[Node, Node]:
    """Constants for linears: packed codes and their sums."""
    four = weights[0].dtype == torch.uint8
    codes = [reference.unpack_int4(weight, channels) if four else weight for weight in weights]
    whole = torch.stack(codes) if stack else codes[0]
    packed = insert.tensor(f"{name}_packed", fused.pack_weight(whole, 4 if four else 8))
    return packed, insert.tensor(f"{name}_sum", whole.sum(-1, dtype=torch.int32))


def _pack_linears(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear.default):
        x, scale, zero_point, weight, weight_scale, bias, dtype = _args(node)
        try:
            value = _constant(gm, weight, "its weight")
        except _Left as reason:
            _note(gm, node, "linear", str(reason))
            continue
        insert = Insertion(gm, node)
        packed = _packed(insert, str(weight.target), [value], x.meta["val"].shape[-1], False)
        _swap(
            gm, node, insert.call(ops.linear_packed.default, x, scale, zero_point, *packed, weight_scale, bias, dtype)
        )
        _note(gm, node, "linear")
    return gm


def _swap(gm: GraphModule, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)


def _fuse_gelus(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
        gelu = _same_tokens(_args(node)[0])
        if not _is(gelu, aten.gelu.default):
            continue
        pattern = "linear + GELU + quantize"
        try:
            _quantizer(gm, node)
            linear = _same_tokens(_args(gelu)[0])
            if not _is(linear, ops.linear.default) or _only_user(linear) is None or _only_user(gelu) is None:
                raise _Left("GELU's input is not an integer linear's, or both have other readers")
            if _arguments(gelu)[1] != "none":
                raise _Left("the tanh approximation of GELU has no kernel")
            x, scale, zero_point, weight, weight_scale, bias, _ = _args(linear)
            value = _constant(gm, weight, "the weight")
        except _Left as reason:
            _note(gm, gelu, pattern, str(reason))
            continue
        insert = Insertion(gm, node)
        packed = _packed(insert, str(weight.target), [value], x.meta["val"].shape[-1], False)
        inputs = (x, scale, zero_point, *packed, weight_scale, bias, *_args(node)[1:])
        _swap(gm, node, insert.call(ops.linear_gelu_quantize.default, *inputs))
        _note(gm, linear, pattern)
    return gm


# --- norms ---


def _fuse_norms(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
        rotate = _rotation(node)
        norm = _same_tokens(_args(node if rotate is None else rotate)[0])
        if not _is(norm, aten.rms_norm.default, aten.layer_norm.default) or _only_user(norm) is None:
            continue
        pattern = "norm + quantize" if rotate is None else "norm + rotate + quantize"
        try:
            quantize = _quantizer(gm, node)
            rms = norm.target is aten.rms_norm.default
            x, sizes, weight, *rest = _arguments(norm)
            bias, eps = (None, rest[0]) if rms else rest[:2]
            if len(sizes) != 1:
                raise _Left("it normalizes more than the channels")
            if eps is None:
                eps = torch.finfo(x.meta["val"].dtype).eps
            terms = _residual(x)
        except _Left as reason:
            _note(gm, norm, pattern, str(reason))
            continue
        # where the sum is, so that all who read it come later
        insert = Insertion(gm, norm if terms is None else x.next)
        value, residual = (x, None) if terms is None else terms
        inputs = (_as_tokens(insert, value), None if residual is None else _as_tokens(insert, residual))
        for constant in _args(quantize.node)[1:4]:
            if isinstance(constant, Node):
                insert.before.prepend(constant)
        for constant in (weight, bias):
            if isinstance(constant, Node):
                insert.before.prepend(constant)
        pair = insert.call(
            ops.norm_quantize.default, *inputs, weight, bias, eps, rms, rotate is not None, *_args(quantize.node)[1:]
        )
        if terms is not None:
            pattern = f"residual + {pattern}"
            total = _shaped_as(insert, insert.call(operator.getitem, pair, 0), x)
            x.replace_all_uses_with(total)
        _swap(gm, quantize.node, insert.call(operator.getitem, pair, 1))
        _note(gm, norm, pattern)
    return gm


def _fuse_rotations(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
        rotate = _rotation(node)
        if rotate is None:
            continue
        pattern = "rotate + quantize"
        try:
            _quantizer(gm, node)
        except _Left as reason:
            _note(gm, rotate, pattern, str(reason))
            continue
        (x,) = _args(rotate)
        gelu = _same_tokens(x)
        exact = _is(gelu, aten.gelu.default) and _arguments(gelu)[1] == "none" and _only_user(gelu) is not None
        insert = Insertion(gm, node)
        source = _as_tokens(insert, _same_tokens(_args(gelu)[0])) if exact else x
        _swap(gm, node, insert.call(ops.rotate_quantize.default, source, exact, *_args(node)[1:]))
        _note(gm, rotate, f"GELU + {pattern}" if exact else pattern)
    return gm


def _rotation(quantize: Node) -> Node | None:
    """The rotation whose result a quantizer alone reads."""
    value = _args(quantize)[0]
    return value if _is(value, ops.rotate.default) and _only_user(value) is not None else None


def _residual(x: Node) -> tuple[Node, Node] | None:
    """Branch and stream of a sum of two values of one shape."""
    if not _is(x, aten.add.Tensor) or x.kwargs or not all(isinstance(term, Node) for term in _args(x)):
        return None
    stream, branch = _args(x)
    shapes = [term.meta["val"].shape for term in (stream, branch)]
    return (branch, stream) if shapes[0] == shapes[1] else None


# --- scans ---

SCAN = "projection + step + scan"


@dataclass(frozen=True)
class _Branch:
    """One direction: a scan, what it reads, and where its results are natural again."""

    scan: Node
    x: TokenMap  # what the convolution, or the scan without one, reads
    conv: Node | None  # the causal convolution of this direction
    input: _Quantizer
    projection: Node
    step: _Quantizer
    step_linear: Node
    z: TokenMap | None
    restored: Node

    @property
    def ranks(self) -> tuple[int, int]:
        """R and S."""
        return self.step.x.meta["val"].shape[-1], _args(self.scan)[2].meta["val"].shape[-1]


def _map(node: Any, what: str) -> TokenMap:
    found = token_map(node) if isinstance(node, Node) else None
    if found is None:
        raise _Left(f"{what} is not a selection of tokens and channels of one value")
    return found


def _branch(gm: GraphModule, scan: Node) -> _Branch:
    u, delta, A, B, C, D, z, bias, softplus = _args(scan)
    if not softplus or bias is None:
        raise _Left("its steps have no bias and softplus")
    for constant, what in ((A, "A"), (D, "D"), (bias, "the bias of its steps")):
        _optional(gm, constant, what)
    if not _is(delta, ops.linear.default) or _args(delta)[5] is not None:
        raise _Left("its steps do not come from an integer linear")
    step = _quantizer(gm, _args(delta)[0])
    low_rank = _map(step.x, "the low-rank step")
    projection, states, rank = low_rank.source, A.meta["val"].shape[-1], step.x.meta["val"].shape[-1]
    tokens = u.meta["val"].shape[1]
    places = [(step.x, 0, rank), (B, rank, rank + states), (C, rank + states, rank + 2 * states)]
    for value, first, last in places:
        found = _map(value, "a projection")
        here = (found.source, found.first, found.last) == (projection, first, last)
        if not here or not found.is_natural(tokens):
            raise _Left("step, B and C are not one projection, cut in this order")
    if not _is(projection, ops.linear.default) or projection.meta["val"].shape[-1] != rank + 2 * states:
        raise _Left("its projection is not an integer linear")
    quantize = _quantizer(gm, _args(projection)[0])
    if quantize.x is not u:
        raise _Left("its projection reads something else")
    _constant(gm, _args(projection)[3], "the projection's weight"), _constant(gm, _args(delta)[3], "the step's weight")
    conv = u if _is(u, ops.causal_conv1d.default) else None
    if conv is not None and (not _args(conv)[3] or len(conv.users) != 2):
        raise _Left("its convolution has no SiLU, or other readers")
    x = _map(u if conv is None else _args(conv)[0], "its input")
    gate = None if z is None else _map(z, "its gate")
    if gate is not None and not torch.equal(gate.tokens, x.tokens):
        raise _Left("its gate comes in another order than its input")
    return _Branch(scan, x, conv, quantize, projection, step, delta, gate, _restored(scan, x))


def _restored(scan: Node, x: TokenMap) -> Node:
    """Where the scan's tokens are back in natural order."""
    node = scan
    while (user := _only_user(node)) is not None and moves_tokens(user) and len(user.all_input_nodes) == 1:
        node = user
    places = torch.arange(len(x.tokens)) if node is scan else _map(node, "its result").tokens
    count = int(x.tokens.max()) + 1
    if node.meta["val"].dim() != 3 or len(places) != count:
        raise _Left("its result has other tokens than its input")
    if not torch.equal(x.tokens[places], torch.arange(count)):
        raise _Left("its result is put back in another order than the natural one")
    return node


def _fuse_scans(gm: GraphModule) -> GraphModule:
    groups: dict[tuple[Node, int], list[_Branch]] = {}
    for scan in gm.graph.find_nodes(op="call_function", target=ops.selective_scan.default):
        try:
            branch = _branch(gm, scan)
        except _Left as reason:
            _note(gm, scan, SCAN, str(reason))
            continue
        groups.setdefault((branch.x.source, branch.x.first), []).append(branch)
    for branches in groups.values():
        try:
            _fuse_directions(gm, branches)
        except _Left as reason:
            _note(gm, branches[0].scan, SCAN, str(reason))
    return gm


def _fuse_directions(gm: GraphModule, branches: list[_Branch]) -> None:
    first = branches[0]
    for other in branches[1:]:
        same = (
            other.ranks == first.ranks
            and (other.conv is None) == (first.conv is None)
            and (other.x.first, other.x.last) == (first.x.first, first.x.last)
            and _gate_of(other) == _gate_of(first)
            and (other.input.bits, other.step.bits) == (first.input.bits, first.step.bits)
            and len(other.x.tokens) == len(first.x.tokens)
            and _weight_types(other) == _weight_types(first)
        )
        if not same:
            raise _Left("its directions differ in more than their order and weights")
    tokens = int(first.x.tokens.max()) + 1
    stack = _Stack(gm, branches, tokens)
    producer = _conv2d(gm, branches, tokens) if first.conv is None else None
    if first.conv is not None and (first.x.source.meta["val"].dim() != 3 or len(first.x.tokens) != tokens):
        raise _Left("its convolution reads padding, or maps")
    merged, factor = _merged([branch.restored for branch in branches])
    result = None
    if merged is not None:
        user = _only_user(merged)
        try:
            result = _quantizer(gm, user)
        except _Left:
            result = None

    insert = Insertion(gm, min((branch.scan for branch in branches), key=_position(gm)))
    order = insert.tensor(stack.name("order"), torch.stack([branch.x.tokens for branch in branches]).int())
    qparams = stack.qparams(insert, "input", [branch.input for branch in branches])
    if producer is None:
        x = _slice(insert, first.x.source, first.x.first, first.x.last)
        weight, bias = stack.convolutions(insert)
        pair = insert.call(ops.conv1d_quantize.default, x, weight, bias, order, *qparams)
        u = insert.call(operator.getitem, pair, 0)
        _note(gm, first.conv or first.scan, f"convolution + SiLU + quantize, {len(branches)} directions")
    else:
        pair = producer(insert, qparams)
        u = insert.call(aten.unsqueeze.default, insert.call(operator.getitem, pair, 0), 0)
    codes = insert.call(operator.getitem, pair, 1)
    projections = stack.linear(insert, "projection", [branch.projection for branch in branches])
    projected = insert.call(ops.linear_packed.default, codes, *projections, torch.float32)
    z = None if first.z is None else _slice(insert, first.z.source, first.z.first, first.z.last)
    inputs = (u, projected, *stack.steps(insert), z, order)
    name, where = f"{SCAN}, {len(branches)} directions", first.scan
    if merged is None:
        scans = insert.call(ops.directional_scan.default, *inputs, False, factor)
        for k, branch in enumerate(branches):
            branch.restored.replace_all_uses_with(insert.call(aten.select.int, scans, 0, k))
    elif result is None:
        merged.replace_all_uses_with(insert.call(ops.directional_scan.default, *inputs, True, factor))
        name += ", summed"
    else:
        for constant in _args(result.node)[1:4]:
            if isinstance(constant, Node):
                insert.before.prepend(constant)
        scanned = insert.call(ops.directional_scan_quantize.default, *inputs, factor, *_args(result.node)[1:])
        _swap(gm, result.node, scanned)
        name += ", summed + quantize"
    gm.graph.eliminate_dead_code()
    _note(gm, where, name)


def _gate_of(branch: _Branch) -> Any:
    return None if branch.z is None else (branch.z.source, branch.z.first, branch.z.last)


def _weight_types(branch: _Branch) -> Any:
    return [_args(linear)[3].meta["val"].dtype for linear in (branch.projection, branch.step_linear)]


def _position(gm: GraphModule) -> Callable[[Node], int]:
    places = {node: i for i, node in enumerate(gm.graph.nodes)}
    return places.__getitem__


def _slice(insert: Insertion, source: Node, first: int, last: int) -> Node:
    whole = (first, last) == (0, source.meta["val"].shape[-1])
    return source if whole else insert.call(aten.slice.Tensor, source, source.meta["val"].dim() - 1, first, last)


def _merged(restored: list[Node]) -> tuple[Node | None, float]:
    """The sum of all of them, with a factor that follows it; None where something else reads them."""
    terms = list(restored)
    while len(terms) > 1:
        users = [user for term in terms if (user := _only_user(term)) is not None]
        total = next((user for user in users if _is(user, aten.add.Tensor) and set(_args(user)) <= set(terms)), None)
        if total is None or len(total.all_input_nodes) != 2 or total.kwargs:
            return None, 1.0
        terms = [term for term in terms if term not in _args(total)] + [total]
    user = _only_user(terms[0])
    if user is not None and _is(user, aten.mul.Tensor, aten.div.Tensor) and isinstance(_args(user)[1], (int, float)):
        value = float(_args(user)[1])
        return user, value if user.target is aten.mul.Tensor else 1.0 / value
    return terms[0], 1.0


def _conv2d(gm: GraphModule, branches: list[_Branch], tokens: int) -> Callable[[Insertion, tuple[Any, ...]], Node]:
    """Emits the depth-wise convolution and SiLU of a map that the directions read."""
    silu = branches[0].x.source
    conv = _args(silu)[0] if _is(silu, aten.silu.default) else None
    if not isinstance(conv, Node) or conv.target is not aten.conv2d.default or _only_user(conv) is not silu:
        raise _Left("its input is not a depth-wise convolution and SiLU")
    image, weight, bias, stride, padding, dilation, groups = _arguments(conv)
    kernel = _constant(gm, weight, "the convolution's weight")
    channels, height, width = silu.meta["val"].shape[1:]
    sizes = [size // 2 for size in kernel.shape[2:]]
    same = list(padding) == sizes and all(size % 2 for size in kernel.shape[2:])
    if groups != channels or kernel.shape[1] != 1 or not same or {*stride, *dilation} != {1}:
        raise _Left("its convolution is not depth-wise with stride 1 and zeros around the map")
    x = _map(_channels_last(image), "the convolution's input")
    if not x.is_natural(tokens):
        raise _Left("its convolution reads tokens in another order")

    def emit(insert: Insertion, qparams: tuple[Any, ...]) -> Node:
        source = _as_tokens(insert, _slice(insert, x.source, x.first, x.last))
        taps = insert.tensor(f"{weight.target}_taps", kernel.squeeze(1).contiguous())
        call = (source, taps, bias, height, width, *qparams)
        _note(gm, conv, f"depth-wise convolution + SiLU + quantize, {len(branches)} directions")
        return insert.call(ops.conv2d_quantize.default, *call)

    return emit


def _channels_last(image: Node) -> Node:
    """What a permute to channels first reads."""
    if not _is(image, aten.permute.default) or list(_args(image)[1]) != [0, 3, 1, 2]:
        raise _Left("its convolution's input is not a channels-last map")
    return _args(image)[0]


class _Stack:
    """The constants of K directions, stacked, with per-token values in natural order."""

    def __init__(self, gm: GraphModule, branches: list[_Branch], tokens: int) -> None:
        self.gm, self.branches, self.tokens = gm, branches, tokens
        self.prefix = str(_args(branches[0].step_linear)[3].target).rpartition(".")[0]

    def name(self, what: str) -> str:
        return f"{self.prefix}.directions_{what}"

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

    def qparams(self, insert: Insertion, what: str, quantizers: Sequence[_Quantizer]) -> tuple[Any, ...]:
        scale = self.natural([quantizer.inv_scale for quantizer in quantizers])
        zero = self.natural([quantizer.zero_point for quantizer in quantizers])
        return (
            insert.tensor(self.name(f"{what}_inv_scale"), scale),
            insert.tensor(self.name(f"{what}_zero_point"), zero),
            self.smoothing(insert, what, quantizers),
            quantizers[0].bits,
        )

    def smoothing(self, insert: Insertion, what: str, quantizers: Sequence[_Quantizer]) -> Node | None:
        vectors = [quantizer.inv_smooth for quantizer in quantizers]
        given = next((vector for vector in vectors if vector is not None), None)
        if given is None:
            return None
        stacked = torch.stack([torch.ones_like(given) if vector is None else vector for vector in vectors])
        return insert.tensor(self.name(f"{what}_inv_smooth"), stacked)

    def _constants(self, nodes: Sequence[Any], what: str) -> list[Tensor]:
        return [_constant(self.gm, node, what) for node in nodes]

    def _biases(self, insert: Insertion, what: str, nodes: Sequence[Any]) -> Node | None:
        values = [_optional(self.gm, node, what) for node in nodes]
        given = next((value for value in values if value is not None), None)
        if given is None:
            return None
        return insert.tensor(
            self.name(what), torch.stack([torch.zeros_like(given) if value is None else value for value in values])
        )

    def convolutions(self, insert: Insertion) -> tuple[Node, Node | None]:
        convs = [branch.conv for branch in self.branches if branch.conv is not None]
        weight = torch.stack(self._constants([_args(conv)[1] for conv in convs], "a convolution's weight"))
        biases = self._biases(insert, "conv_bias", [_args(conv)[2] for conv in convs])
        return insert.tensor(self.name("conv_weight"), weight), biases

    def linear(self, insert: Insertion, what: str, linears: Sequence[Node]) -> tuple[Any, ...]:
        """Scales and zero points of the inputs, weight, sums, scales and biases."""
        x = _args(linears[0])[0]
        scales, zeros, weights, weight_scales = (
            self._constants([_args(linear)[i] for linear in linears], what) for i in (1, 2, 3, 4)
        )
        packed = _packed(insert, self.name(what), weights, x.meta["val"].shape[-1], True)
        return (
            insert.tensor(self.name(f"{what}_input_scale"), self.natural(scales)),
            insert.tensor(self.name(f"{what}_input_zero_point"), self.natural(zeros)),
            *packed,
            insert.tensor(self.name(f"{what}_scale"), torch.stack(weight_scales)),
            self._biases(insert, f"{what}_bias", [_args(linear)[5] for linear in linears]),
        )

    def steps(self, insert: Insertion) -> tuple[Any, ...]:
        """The scan's constants from `step_inv_scale` to D."""
        steps, scans = [branch.step for branch in self.branches], [branch.scan for branch in self.branches]
        inv_scale, zero_point, inv_smooth, bits = self.qparams(insert, "step", steps)
        linears = [branch.step_linear for branch in self.branches]
        scale, _, weight, weight_sum, weight_scale, _ = self.linear(insert, "step_linear", linears)
        stacked = [
            insert.tensor(
                self.name(what), torch.stack(self._constants([_args(scan)[i] for scan in scans], what)).float()
            )
            for what, i in (("step_bias", 7), ("A", 2))
        ]
        D = self._biases(insert, "D", [_args(scan)[5] for scan in scans])
        quantized = (inv_scale, scale, zero_point, inv_smooth, bits, weight, weight_sum, weight_scale)
        return (*quantized, *stacked, D)


def _note_left(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
        _note(gm, node, "quantize", f"its input comes from {_same_tokens(_args(node)[0]).target}")
    return gm


# Where an operator reads activations that may be bfloat16.
_READS = {
    ops.norm_quantize.default: (0,),
    ops.rotate_quantize.default: (0,),
    ops.conv1d_quantize.default: (0,),
    ops.conv2d_quantize.default: (0,),
    ops.directional_scan.default: (13,),
    ops.directional_scan_quantize.default: (13,),
}


def _halve(gm: GraphModule) -> GraphModule:
    """Linears whose readers all take bfloat16 write it; so do the convolutions and scans that read them.

    The convolutions between stages and before the first block are computed in bfloat16, and give float32.
    """
    for conv in gm.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        if all(isinstance(term, Node) and term.op == "get_attr" for term in _args(conv)[1:3]):
            _halve_convolution(gm, conv)
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear_packed.default):
        if _args(node)[-1] is torch.float32 and _read_by(node, _READS):
            node.args = (*node.args[:-1], torch.bfloat16)
    gm = _propagate(gm)
    for node in gm.graph.find_nodes(op="call_function", target=ops.directional_scan.default):
        if node.meta["val"].dtype is torch.bfloat16 and not _read_by(node, _READS):
            with gm.graph.inserting_after(node):
                wide = gm.graph.call_function(aten.to.dtype, (node, torch.float32))
            wide.meta["val"] = value_of(gm, wide.target, wide.args)
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
    return _propagate(gm)


def _halve_convolution(gm: GraphModule, conv: Node) -> None:
    insert, (x, *constants) = Insertion(gm, conv), _args(conv)
    halves = [
        insert.tensor(f"{constant.target}_bfloat16", _constant(gm, constant, "").bfloat16())
        for constant in constants[:2]
    ]
    y = insert.call(aten.conv2d.default, insert.call(aten.to.dtype, x, torch.bfloat16), *halves, *constants[2:])
    _swap(gm, conv, insert.call(aten.to.dtype, y, torch.float32))


def _read_by(node: Node, slots: Mapping[Any, tuple[int, ...]]) -> bool:
    """Whether all readers, also of views of it, are these operators, which read it in these places alone."""
    for user in node.users:
        if moves_tokens(user) or user.target is aten.unsqueeze.default:
            if not _read_by(user, slots):
                return False
        elif any(i not in slots.get(user.target, ()) for i, value in enumerate(user.args) if value is node):
            return False
    return bool(node.users)


def _propagate(gm: GraphModule) -> GraphModule:
    """Every value's type and shape, from those of the inputs and constants."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" in node.meta:
            node.meta["val"] = value_of(gm, node.target, node.args, node.kwargs)
    return gm


_FUSE = Pipeline(
    (
        _drop_identities,
        fold_constants,
        _fuse_scans,
        _fuse_gelus,
        _fuse_norms,
        _fuse_rotations,
        _pack_linears,
        _note_left,
        drop_unused_tensors,
    )
)
