"""Operators in exported and compiled graphs."""

import torch
from helpers.operator_inputs import conv_inputs, linear_inputs, quantize_inputs, scan_inputs, with_gradient
from helpers.strategies import normal
from torch import nn
from torch.export import Dim

from ptq4vm import ops


class AllOps(nn.Module):
    """Every op that a model or a quantized graph contains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_inputs = conv_inputs(1, 5, 3)[1:]
        self.scan_inputs = [value for value in scan_inputs(1, 5, 3, 2) if isinstance(value, torch.Tensor)]
        self.quantize_inputs = quantize_inputs(1, 5, 3)[1:]
        self.linear_inputs = linear_inputs(1, 5, 3, 3)[3:]

    def forward(self, x):
        x = ops.causal_conv1d(x, *self.conv_inputs)
        _, delta, A, B, C, D, z, bias = self.scan_inputs
        batch = (x.shape[0], -1, -1)
        x = ops.selective_scan(
            x, delta.expand(batch), A, B.expand(batch), C.expand(batch), D, z.expand(batch), bias, True
        )
        inv_scale, zero_point, inv_smooth, count = self.quantize_inputs
        codes = ops.quantize(x, inv_scale, zero_point, inv_smooth, count)
        y = ops.linear(codes, 1 / inv_scale, zero_point, *self.linear_inputs)
        scale, zero_point = ops.choose_qparams(y, None, 8)
        return ops.dequantize(ops.quantize(y, 1 / scale, zero_point, None, 8), scale, zero_point)


NAMES = ["causal_conv1d", "selective_scan", "quantize", "linear", "choose_qparams", "quantize", "dequantize"]


def test_an_exported_op_is_one_node_and_the_batch_stays_dynamic():
    model = AllOps()
    exported = torch.export.export(
        model, (normal(2, 5, 3),), dynamic_shapes=({0: Dim("batch")},), strict=False
    ).module()
    targets = [str(node.target) for node in exported.graph.nodes]
    assert [target.split(".")[1] for target in targets if target.startswith("ptq4vm.")] == NAMES
    for images in (1, 2, 7):
        x = normal(images, 5, 3, seed=images)
        assert torch.equal(exported(x), model(x))


def test_ops_compile_without_a_graph_break():
    model = AllOps()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for images in (2, 7):
        x = normal(images, 5, 3, seed=images)
        assert torch.equal(compiled(x), model(x))


def test_learning_through_a_compiled_scan_and_convolution():
    def loss(x, weight, bias, *scan):
        return ops.selective_scan(ops.causal_conv1d(x, weight, bias, True), *scan, True).square().sum()

    _, *scan, _ = scan_inputs(2, 5, 3, 2)
    x, weight, bias, _ = conv_inputs(2, 5, 3)
    inputs = with_gradient((x, weight, bias, *scan))
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    theirs = torch.autograd.grad(loss(*inputs), inputs)
    ours = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
