"""K selective scans of one value, each in its own order, and what they read ⇒ operators for all K that move no tokens.

The patterns are in `fuse`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion, aten, replace_node
from ptq4vm.graph.token_order import TokenMap, moves_tokens, token_map
from ptq4vm.passes.lower.patterns import (
    NotFused,
    Quantizer,
    args,
    arguments,
    as_tokens,
    is_call,
    only_user,
    pack_weights,
    read_constant,
    read_optional,
    read_quantizer,
    record_fusion,
)

SCAN = "projection + step + scan"


@dataclass(frozen=True)
class _Branch:
    """One direction: a scan, what it reads, and where its results are natural again."""

    scan: Node
    x: TokenMap  # what the convolution, or the scan without one, reads
    conv: Node | None  # the causal convolution of this direction
    input: Quantizer
    projection: Node
    step: Quantizer
    step_linear: Node
    z: TokenMap | None
    restored: Node

    @property
    def ranks(self) -> tuple[int, int]:
        """R and S."""
        return self.step.x.meta["val"].shape[-1], args(self.scan)[2].meta["val"].shape[-1]


def _map(node: Any, what: str) -> TokenMap:
    found = token_map(node) if isinstance(node, Node) else None
    if found is None:
        raise NotFused(f"{what} is not a selection of tokens and channels of one value")
    return found


def _branch(gm: GraphModule, scan: Node) -> _Branch:
    u, delta, A, B, C, D, z, bias, softplus = args(scan)
    if not softplus or bias is None:
        raise NotFused("its steps have no bias and softplus")
    for constant, what in ((A, "A"), (D, "D"), (bias, "the bias of its steps")):
        read_optional(gm, constant, what)
    if not is_call(delta, ops.linear.default) or args(delta)[5] is not None:
        raise NotFused("its steps do not come from an integer linear")
    step = read_quantizer(gm, args(delta)[0])
    low_rank = _map(step.x, "the low-rank step")
    projection, states, rank = low_rank.source, A.meta["val"].shape[-1], step.x.meta["val"].shape[-1]
    tokens = u.meta["val"].shape[1]
    places = [(step.x, 0, rank), (B, rank, rank + states), (C, rank + states, rank + 2 * states)]
    for value, first, last in places:
        found = _map(value, "a projection")
        here = (found.source, found.first, found.last) == (projection, first, last)
        if not here or not found.is_natural(tokens):
            raise NotFused("step, B and C are not one projection, cut in this order")
    if not is_call(projection, ops.linear.default) or projection.meta["val"].shape[-1] != rank + 2 * states:
        raise NotFused("its projection is not an integer linear")
    quantize = read_quantizer(gm, args(projection)[0])
    if quantize.x is not u:
        raise NotFused("its projection reads something else")
    read_constant(gm, args(projection)[3], "the projection's weight")
    read_constant(gm, args(delta)[3], "the step's weight")
    conv = u if is_call(u, ops.causal_conv1d.default) else None
    if conv is not None and (not args(conv)[3] or len(conv.users) != 2):
        raise NotFused("its convolution has no SiLU, or other readers")
    x = _map(u if conv is None else args(conv)[0], "its input")
    gate = None if z is None else _map(z, "its gate")
    if gate is not None and not torch.equal(gate.tokens, x.tokens):
        raise NotFused("its gate comes in another order than its input")
    return _Branch(scan, x, conv, quantize, projection, step, delta, gate, _restored(scan, x))


def _restored(scan: Node, x: TokenMap) -> Node:
    """Where the scan's tokens are back in natural order."""
    node = scan
    while (user := only_user(node)) is not None and moves_tokens(user) and len(user.all_input_nodes) == 1:
        node = user
    places = torch.arange(len(x.tokens)) if node is scan else _map(node, "its result").tokens
    count = int(x.tokens.max()) + 1
    if node.meta["val"].dim() != 3 or len(places) != count:
        raise NotFused("its result has other tokens than its input")
    if not torch.equal(x.tokens[places], torch.arange(count)):
        raise NotFused("its result is put back in another order than the natural one")
    return node


def fuse_scans(gm: GraphModule) -> GraphModule:
    groups: dict[tuple[Node, int], list[_Branch]] = {}
    for scan in gm.graph.find_nodes(op="call_function", target=ops.selective_scan.default):
        try:
            branch = _branch(gm, scan)
        except NotFused as reason:
            record_fusion(gm, scan, SCAN, str(reason))
            continue
        groups.setdefault((branch.x.source, branch.x.first), []).append(branch)
    for branches in groups.values():
        try:
            _fuse_directions(gm, branches)
        except NotFused as reason:
            record_fusion(gm, branches[0].scan, SCAN, str(reason))
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
            raise NotFused("its directions differ in more than their order and weights")
    tokens = int(first.x.tokens.max()) + 1
    stack = _Stack(gm, branches, tokens)
    producer = _conv2d(gm, branches, tokens) if first.conv is None else None
    if first.conv is not None and (first.x.source.meta["val"].dim() != 3 or len(first.x.tokens) != tokens):
        raise NotFused("its convolution reads padding, or maps")
    merged, factor = _merged([branch.restored for branch in branches])
    result = None
    if merged is not None:
        user = only_user(merged)
        try:
            result = read_quantizer(gm, user)
        except NotFused:
            result = None

    insert = Insertion(gm, min((branch.scan for branch in branches), key=_position(gm)))
    order = insert.tensor(stack.name("order"), stack.order())
    qparams = stack.qparams(insert, "input", [branch.input for branch in branches])
    if producer is None:
        x = _slice(insert, first.x.source, first.x.first, first.x.last)
        weight, bias = stack.convolutions(insert)
        pair = insert.call(ops.conv1d_quantize.default, x, weight, bias, order, *qparams)
        u = insert.call(operator.getitem, pair, 0)
        record_fusion(gm, first.conv or first.scan, f"convolution + SiLU + quantize, {len(branches)} directions")
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
        insert.move_before(*args(result.node)[1:4])
        scanned = insert.call(ops.directional_scan_quantize.default, *inputs, factor, *args(result.node)[1:])
        replace_node(result.node, scanned)
        name += ", summed + quantize"
    gm.graph.eliminate_dead_code()
    record_fusion(gm, where, name)


def _gate_of(branch: _Branch) -> Any:
    return None if branch.z is None else (branch.z.source, branch.z.first, branch.z.last)


def _weight_types(branch: _Branch) -> Any:
    return [args(linear)[3].meta["val"].dtype for linear in (branch.projection, branch.step_linear)]


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
        users = [user for term in terms if (user := only_user(term)) is not None]
        total = next((user for user in users if is_call(user, aten.add.Tensor) and set(args(user)) <= set(terms)), None)
        if total is None or len(total.all_input_nodes) != 2 or total.kwargs:
            return None, 1.0
        terms = [term for term in terms if term not in args(total)] + [total]
    user = only_user(terms[0])
    if user is not None and is_call(user, aten.mul.Tensor, aten.div.Tensor) and isinstance(args(user)[1], (int, float)):
        value = float(args(user)[1])
        return user, value if user.target is aten.mul.Tensor else 1.0 / value
    return terms[0], 1.0


def _conv2d(gm: GraphModule, branches: list[_Branch], tokens: int) -> Callable[[Insertion, tuple[Any, ...]], Node]:
    """Emits the depth-wise convolution and SiLU of a map that the directions read."""
    silu = branches[0].x.source
    conv = args(silu)[0] if is_call(silu, aten.silu.default) else None
    if not isinstance(conv, Node) or conv.target is not aten.conv2d.default or only_user(conv) is not silu:
        raise NotFused("its input is not a depth-wise convolution and SiLU")
    image, weight, bias, stride, padding, dilation, groups = arguments(conv)
    kernel = read_constant(gm, weight, "the convolution's weight")
    channels, height, width = silu.meta["val"].shape[1:]
    sizes = [size // 2 for size in kernel.shape[2:]]
    same = list(padding) == sizes and all(size % 2 for size in kernel.shape[2:])
    if groups != channels or kernel.shape[1] != 1 or not same or {*stride, *dilation} != {1}:
        raise NotFused("its convolution is not depth-wise with stride 1 and zeros around the map")
    x = _map(_channels_last(image), "the convolution's input")
    if not x.is_natural(tokens):
        raise NotFused("its convolution reads tokens in another order")

    def emit(insert: Insertion, qparams: tuple[Any, ...]) -> Node:
        source = as_tokens(insert, _slice(insert, x.source, x.first, x.last))
        taps = insert.tensor(f"{weight.target}_taps", kernel.squeeze(1).contiguous())
        call = (source, taps, bias, height, width, *qparams)
        record_fusion(gm, conv, f"depth-wise convolution + SiLU + quantize, {len(branches)} directions")
        return insert.call(ops.conv2d_quantize.default, *call)

    return emit


def _channels_last(image: Node) -> Node:
    """What a permute to channels first reads."""
    if not is_call(image, aten.permute.default) or list(args(image)[1]) != [0, 3, 1, 2]:
        raise NotFused("its convolution's input is not a channels-last map")
    return args(image)[0]


class _Stack:
    """The constants of K directions, stacked, with per-token values in natural order."""

    def __init__(self, gm: GraphModule, branches: list[_Branch], tokens: int) -> None:
        self.gm, self.branches, self.tokens = gm, branches, tokens
        self.prefix = str(args(branches[0].step_linear)[3].target).rpartition(".")[0]

    def name(self, what: str) -> str:
        return f"{self.prefix}.directions_{what}"

    def order(self) -> Tensor:
        """The tokens of each direction, on the device of the other constants."""
        tokens = torch.stack([branch.x.tokens for branch in self.branches])
        return self.branches[0].input.zero_point.new_empty(tokens.shape, dtype=torch.int32).copy_(tokens)

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

    def qparams(self, insert: Insertion, what: str, quantizers: Sequence[Quantizer]) -> tuple[Any, ...]:
        scale = self.natural([quantizer.inv_scale for quantizer in quantizers])
        zero = self.natural([quantizer.zero_point for quantizer in quantizers])
        return (
            insert.tensor(self.name(f"{what}_inv_scale"), scale),
            insert.tensor(self.name(f"{what}_zero_point"), zero),
            self.smoothing(insert, what, quantizers),
            quantizers[0].bits,
        )

    def smoothing(self, insert: Insertion, what: str, quantizers: Sequence[Quantizer]) -> Node | None:
        vectors = [quantizer.inv_smooth for quantizer in quantizers]
        given = next((vector for vector in vectors if vector is not None), None)
        if given is None:
            return None
        stacked = torch.stack([torch.ones_like(given) if vector is None else vector for vector in vectors])
        return insert.tensor(self.name(f"{what}_inv_smooth"), stacked)

    def _constants(self, nodes: Sequence[Any], what: str) -> list[Tensor]:
        return [read_constant(self.gm, node, what) for node in nodes]

    def _biases(self, insert: Insertion, what: str, nodes: Sequence[Any]) -> Node | None:
        values = [read_optional(self.gm, node, what) for node in nodes]
        given = next((value for value in values if value is not None), None)
        if given is None:
            return None
        return insert.tensor(
            self.name(what), torch.stack([torch.zeros_like(given) if value is None else value for value in values])
        )

    def convolutions(self, insert: Insertion) -> tuple[Node, Node | None]:
        convs = [branch.conv for branch in self.branches if branch.conv is not None]
        weight = torch.stack(self._constants([args(conv)[1] for conv in convs], "a convolution's weight"))
        biases = self._biases(insert, "conv_bias", [args(conv)[2] for conv in convs])
        return insert.tensor(self.name("conv_weight"), weight), biases

    def linear(self, insert: Insertion, what: str, linears: Sequence[Node], scanned: bool = False) -> tuple[Any, ...]:
        """Scales and zero points of the inputs, weight, sums, scales and biases."""
        x = args(linears[0])[0]
        scales, zeros, weights, weight_scales = (
            self._constants([args(linear)[i] for linear in linears], what) for i in (1, 2, 3, 4)
        )
        packed = pack_weights(insert, self.name(what), weights, x, stack=True, scanned=scanned)
        return (
            insert.tensor(self.name(f"{what}_input_scale"), self.natural(scales)),
            insert.tensor(self.name(f"{what}_input_zero_point"), self.natural(zeros)),
            *packed,
            insert.tensor(self.name(f"{what}_scale"), torch.stack(weight_scales)),
            self._biases(insert, f"{what}_bias", [args(linear)[5] for linear in linears]),
        )

    def steps(self, insert: Insertion) -> tuple[Any, ...]:
        """The scan's constants from `step_inv_scale` to D."""
        steps, scans = [branch.step for branch in self.branches], [branch.scan for branch in self.branches]
        inv_scale, zero_point, inv_smooth, bits = self.qparams(insert, "step", steps)
        linears = [branch.step_linear for branch in self.branches]
        scale, _, weight, weight_sum, weight_scale, _ = self.linear(insert, "step_linear", linears, scanned=True)
        stacked = [
            insert.tensor(
                self.name(what), torch.stack(self._constants([args(scan)[i] for scan in scans], what)).float()
            )
            for what, i in (("step_bias", 7), ("A", 2))
        ]
        D = self._biases(insert, "D", [args(scan)[5] for scan in scans])
        quantized = (inv_scale, scale, zero_point, inv_smooth, bits, weight, weight_sum, weight_scale)
        return (*quantized, *stacked, D)
