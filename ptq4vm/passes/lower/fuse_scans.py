"""K selective scans of one value, each in its own order, and what they read ⇒ operators for all K that move no tokens.

The patterns are in `fuse`.
"""

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion, arguments, aten, replace_node
from ptq4vm.passes.lower.patterns import (
    NotFused,
    args,
    as_tokens,
    is_call,
    only_user,
    read_constant,
    read_quantizer,
    record_fusion,
    recorded_skip,
    shaped_as,
)
from ptq4vm.passes.lower.scan_branches import Branch, find_branch, restored_scan, selection_of
from ptq4vm.passes.lower.scan_merges import find_merge
from ptq4vm.passes.lower.stacked_constants import StackedConstants

SCAN = "projection + step + scan"


def fuse_scans(gm: GraphModule) -> GraphModule:
    groups: dict[tuple[Node, int], list[Branch]] = {}
    for scan in gm.graph.find_nodes(op="call_function", target=ops.selective_scan.default):
        with recorded_skip(gm, scan, SCAN):
            branch = find_branch(gm, scan)
            groups.setdefault((branch.x.source, branch.x.first), []).append(branch)
    for branches in groups.values():
        with recorded_skip(gm, branches[0].scan, SCAN):
            _fuse_directions(gm, branches)
    return gm


def _fuse_directions(gm: GraphModule, branches: list[Branch]) -> None:
    first = branches[0]
    if any(_kind(other) != _kind(first) for other in branches[1:]):
        raise NotFused("its directions differ in more than their order and weights")
    tokens = int(first.x.tokens.max()) + 1
    stack = StackedConstants(gm, branches, tokens)
    producer = _conv2d(gm, branches, tokens) if first.conv is None else None
    if first.conv is not None and (first.x.source.meta["val"].dim() != 3 or len(first.x.tokens) != tokens):
        raise NotFused("its convolution reads padding, or maps")
    merge = find_merge([branch.scan for branch in branches], [branch.x.tokens for branch in branches])
    restored = [] if merge is not None else [restored_scan(branch.scan, branch.x) for branch in branches]
    result = None
    with contextlib.suppress(NotFused):
        result = None if merge is None else read_quantizer(gm, only_user(merge.total))

    insert = Insertion(gm, min(branch.scan for branch in branches))
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
    if merge is None:
        scans = insert.call(ops.directional_scan.default, *inputs, False, 1.0)
        for k, node in enumerate(restored):
            node.replace_all_uses_with(insert.call(aten.select.int, scans, 0, k))
    elif result is None:
        total = insert.call(ops.directional_scan.default, *inputs, True, merge.factor)
        merge.total.replace_all_uses_with(shaped_as(insert, total, merge.total))
        name += ", summed"
    else:
        insert.move_before(*args(result.node)[1:4])
        scanned = insert.call(ops.directional_scan_quantize.default, *inputs, merge.factor, *args(result.node)[1:])
        replace_node(result.node, scanned)
        name += ", summed + quantize"
    gm.graph.eliminate_dead_code()
    record_fusion(gm, where, name)


def _kind(branch: Branch) -> tuple[Any, ...]:
    """Returns what directions of one operator have in common."""
    x, z = branch.x, branch.z
    selections = (x.first, x.last, len(x.tokens)), None if z is None else (z.source, z.first, z.last)
    types = [args(linear)[3].meta["val"].dtype for linear in (branch.projection, branch.dt_linear)]
    return branch.ranks, branch.conv is None, selections, branch.input.bits, branch.dt.bits, types


def _slice(insert: Insertion, source: Node, first: int, last: int) -> Node:
    whole = (first, last) == (0, source.meta["val"].shape[-1])
    return source if whole else insert.call(aten.slice.Tensor, source, source.meta["val"].dim() - 1, first, last)


def _conv2d(gm: GraphModule, branches: list[Branch], tokens: int) -> Callable[[Insertion, tuple[Any, ...]], Node]:
    """Emits the depth-wise convolution and SiLU of a map that the directions read."""
    silu: Any = branches[0].x.source
    maps: Any = args(silu)[0] if is_call(silu, aten.silu.default) else None
    conv: Any = args(maps)[0] if is_call(maps, aten.permute.default) and args(maps)[1] == [0, 2, 3, 1] else None
    if not is_call(conv, aten.conv2d.default) or (only_user(conv), only_user(maps)) != (maps, silu):
        raise NotFused("its input is not a depth-wise convolution and SiLU")
    image, weight, bias, stride, padding, dilation, groups = arguments(conv)
    kernel = read_constant(gm, weight, "the convolution's weight")
    channels, height, width = conv.meta["val"].shape[1:]
    sizes = [size // 2 for size in kernel.shape[2:]]
    same = list(padding) == sizes and all(size % 2 for size in kernel.shape[2:])
    if groups != channels or kernel.shape[1] != 1 or not same or {*stride, *dilation} != {1}:
        raise NotFused("its convolution is not depth-wise with stride 1 and zeros around the map")
    if not is_call(image, aten.permute.default) or list(args(image)[1]) != [0, 3, 1, 2]:
        raise NotFused("its convolution's input is not a channels-last map")
    x = selection_of(args(image)[0], "the convolution's input")
    if not x.is_natural(tokens):
        raise NotFused("its convolution reads tokens in another order")

    def emit(insert: Insertion, qparams: tuple[Any, ...]) -> Node:
        source = as_tokens(insert, _slice(insert, x.source, x.first, x.last))
        taps = insert.tensor(f"{weight.target}_taps", kernel.squeeze(1).contiguous())
        call = (source, taps, bias, height, width, *qparams)
        record_fusion(gm, conv, f"depth-wise convolution + SiLU + quantize, {len(branches)} directions")
        return insert.call(ops.conv2d_quantize.default, *call)

    return emit
