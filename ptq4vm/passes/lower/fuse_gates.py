"""Gates before a quantized linear: a product, or a sum of products, that writes its codes alone.

The patterns are in `fuse`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.insert import Insertion, aten, replace_node
from ptq4vm.passes.lower.patterns import (
    NotFused,
    args,
    as_tokens,
    is_call,
    only_user,
    read_quantizer,
    record_fusion,
    recorded_skip,
    same_tokens,
    source_of,
)


@dataclass(frozen=True)
class _Term:
    """A product of a value (B, …, E) and its gate, of the same shape or (B, 1, …, 1, E)."""

    x: Node
    gate: Node


def fuse_gates(gm: GraphModule) -> GraphModule:
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
        source = source_of(node)
        total = same_tokens(source.x)
        terms = [] if source.rotate is not None or node.meta["val"].dim() != 3 else _terms(total)
        if not terms:
            continue
        pattern = "gate + quantize" if len(terms) == 1 else f"{len(terms)} gates, summed + quantize"
        with recorded_skip(gm, total, pattern):
            read_quantizer(gm, node)
            if any(only_user(value) is None for value in (total, *source.between)):
                raise NotFused("the gated value has other readers")
            if len({_is_shared(term.gate, term.x) for term in terms}) > 1:
                raise NotFused("some of its gates are of one token, others of all tokens")
            insert, silu = Insertion(gm, node), _silu(terms)
            values = [as_tokens(insert, same_tokens(term.x)) for term in terms]
            gates = [as_tokens(insert, same_tokens(args(term.gate)[0] if silu else term.gate)) for term in terms]
            order = _order(values)
            x, gate = (_stacked(insert, [each[k] for k in order]) for each in (values, gates))
            qparams = args(node)[1:]
            codes = insert.call(ops.gate_quantize.default, x, gate, silu, *qparams)
            replace_node(node, codes)
            record_fusion(gm, total, f"SiLU of {pattern}" if silu else pattern)
    return gm


def _terms(node: Node) -> list[_Term]:
    """Returns the products that a value is the sum of; none for any other value."""
    if not is_call(node, aten.add.Tensor, aten.mul.Tensor) or node.kwargs:
        return []
    values = [value for value in args(node) if isinstance(value, Node)]
    if len(values) < 2 or node.meta["val"].dim() < 3:
        return []
    if node.target is aten.mul.Tensor:
        return _product(*values)
    if any(value.meta["val"].shape != node.meta["val"].shape for value in values):
        return []
    found = [_terms(each) if only_user(each := same_tokens(value)) is not None else [] for value in values]
    return [term for terms in found for term in terms] if all(found) else []


def _product(a: Node, b: Node) -> list[_Term]:
    x, gate = (b, a) if is_call(a, aten.silu.default) or _is_shared(a, b) else (a, b)
    fits = x.meta["val"].shape == gate.meta["val"].shape or _is_shared(gate, x)
    floats = all(value.meta["val"].is_floating_point() for value in (x, gate))
    return [_Term(x, gate)] if fits and floats else []


def _is_shared(gate: Node, x: Node) -> bool:
    """Returns whether all tokens of an image have one gate."""
    own, whole = gate.meta["val"].shape, x.meta["val"].shape
    ends = [(shape[0], shape[-1]) for shape in (own, whole) if len(shape) == len(whole)]
    return own != whole and len(ends) == 2 and ends[0] == ends[1] and all(size == 1 for size in own[1:-1])


def _silu(terms: Sequence[_Term]) -> bool:
    """Returns whether all gates are SiLUs that nothing else reads, of every token: of a few it costs nothing."""
    return all(
        is_call(term.gate, aten.silu.default) and only_user(term.gate) is not None and not _is_shared(term.gate, term.x)
        for term in terms
    )


def _order(values: Sequence[Node]) -> list[int]:
    """Returns the order in which the values are those of one stack, where there is one; else their own."""
    if all(is_call(value, aten.select.int) and args(value)[1] == 0 for value in values):
        return sorted(range(len(values)), key=lambda k: args(values[k])[2])
    return list(range(len(values)))


def _stacked(insert: Insertion, values: Sequence[Node]) -> Node:
    """Returns the values along a first axis: the tensor whose parts they are, where it has no others."""
    whole, selected = args(values[0])[0], all(is_call(value, aten.select.int) for value in values)
    places = [args(value)[1:] for value in values if selected and args(value)[0] is whole]
    if places == [(0, k) for k in range(len(values))] and whole.meta["val"].shape[0] == len(values):
        return whole
    if len(values) == 1:
        return insert.call(aten.unsqueeze.default, values[0], 0)
    return insert.call(aten.stack.default, list(values))
