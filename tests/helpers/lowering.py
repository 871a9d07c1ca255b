"""Integers of the lowered graph against those of the Q/DQ graph, linear by linear.

Teacher forced: the Q/DQ graph runs, and each linear of the lowered graph is given the floating-point input that the
same linear had there. So a difference in one linear cannot hide, or cause, one in the next.
B images, L tokens, D channels in, N out.
"""

import torch
from torch import fx

from ptq4vm import convert, ops
from ptq4vm.graph.insert import attribute
from ptq4vm.ops import layouts, linears
from ptq4vm.quantizers import quantized_decomposed as qd

aten = torch.ops.aten


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule, *inputs: torch.Tensor) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, object] = {}
        self.run(*inputs)

    def run_node(self, node: fx.Node) -> object:
        self.values[node] = super().run_node(node)
        return self.values[node]


def in_order(gm: fx.GraphModule, target) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is target]


def quantized_linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Linears of the Q/DQ graph with a dequantized weight."""
    weight = qd.dequantize_per_channel.default
    return [node for node in in_order(gm, aten.linear.default) if node.args[1].target is weight]


def parts(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The codes of a Q/DQ linear's input, and what they were made from, before any smoothing."""
    codes = node.args[0].args[0]
    source = codes.args[0]
    factor = source.args[1] if source.target is aten.mul.Tensor else None
    smoothed = isinstance(factor, fx.Node) and str(factor.target).endswith(".inv_smooth")
    return codes, source.args[0] if smoothed else source


def qparams(node: fx.Node, recorder: Recorder) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a Q/DQ linear's input."""
    scale, zero_point = node.args[0].args[1:3]
    if isinstance(scale, fx.Node):
        return recorder.values[scale], recorder.values[zero_point]
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def constant(gm: fx.GraphModule, node: fx.Node | None):
    return None if node is None else attribute(gm, node.target)


def forced(gm: fx.GraphModule, node: fx.Node, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, output and zero point of one lowered linear on x."""
    quantize = node.args[0]
    _, inv_scale, zero_point, inv_smooth, count = quantize.args
    inv_smooth = constant(gm, inv_smooth)
    if inv_scale.op == "get_attr":
        inv_scale, zero_point, scale = (constant(gm, arg) for arg in (inv_scale, zero_point, node.args[1]))
    else:
        scale, zero_point = ops.choose_qparams(x, inv_smooth, count)
        inv_scale = scale.reciprocal()
    codes = ops.quantize(x, inv_scale, zero_point, inv_smooth, count)
    _, _, _, weight, weight_scale, bias, dtype = node.args
    rest = (constant(gm, weight), constant(gm, weight_scale), constant(gm, bias), dtype)
    return codes, ops.linear(codes, scale, zero_point, *rest), zero_point


def check(prepared: fx.GraphModule, x: torch.Tensor) -> int:
    """Holds every linear of the lowered graph to those of the Q/DQ graph; how many there were."""
    exchange, lowered = convert(prepared, lower=False), convert(prepared)
    recorder = Recorder(exchange, x)
    pairs = list(zip(quantized_linears(exchange), in_order(lowered, ops.linear.default), strict=True))
    for theirs, ours in pairs:
        code_node, source = parts(theirs)
        their_codes = recorder.values[code_node]
        codes, y, zero_point = forced(lowered, ours, recorder.values[source])
        assert codes.dtype == torch.int8 and torch.equal(codes, their_codes)

        scale, their_zero_point = qparams(theirs, recorder)
        weight_q, weight_scale = (recorder.values[theirs.args[1].args[i]] for i in (0, 1))
        acc = (their_codes.long() - their_zero_point.long().unsqueeze(-1)) @ weight_q.long().t()
        weight = constant(lowered, ours.args[3])
        integers = layouts.unpack_int4(weight, codes.shape[-1]) if weight.dtype == torch.uint8 else weight
        assert torch.equal(integers, weight_q)
        assert torch.equal(linears.accumulate(codes, zero_point, integers).long(), acc)

        bias = recorder.values[theirs.args[2]] if len(theirs.args) > 2 else None
        assert torch.equal(y, linears.rescale(acc, scale, weight_scale, bias, torch.float32))
        product = acc.double() * scale.double().unsqueeze(-1) * weight_scale.double()
        want = product if bias is None else product + bias.double()
        # two multiplications and, with a bias, a sum: half a unit of its result each
        eps = torch.finfo(torch.float32).eps * (1 + 1e-6)
        limit = eps * product.abs() + (0 if bias is None else eps / 2 * want.abs() + eps**2)
        assert ((y.double() - want).abs() <= limit).all()
    return len(pairs)
