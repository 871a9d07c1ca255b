"""How long JLSS (learning smoothing scales and step sizes) of one Vim-S block takes, beside the reference operators.

    python benchmarks/learning.py [--images 32] [--epochs 5] [--rounds 3] [--threads 2]

197 tokens of 384 channels, W4A4, random images; a round is some epochs of one step, forward and backward, with each.
Both run in this process and take turns. The reference is the same graph with scan, convolution and fake-quantizers
in plain PyTorch (`reference.py`).
"""

import argparse
import statistics
import time
from unittest import mock

import timm
import torch
from torch import fx

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from ptq4vm import QuantConfig, ops, prepare, reference
from ptq4vm.backend import native
from ptq4vm.config import Learning
from ptq4vm.graph.partition import Part, cut
from ptq4vm.metadata import prepared_metadata
from ptq4vm.passes.calibrate.blockwise import calibrate_blocks
from ptq4vm.passes.calibrate.jlss import learn_block
from ptq4vm.passes.quantized import QuantizedLinear, quantized_linears
from ptq4vm.quantizers import Mode


def in_pytorch(forward, backward) -> type[torch.autograd.Function]:
    """An operator of `reference.py` with its explicit gradient."""

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.flag = inputs[-1]
            ctx.save_for_backward(*inputs[:-1])
            return forward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            inputs = ctx.saved_tensors
            grads = backward(grad.contiguous(), *inputs, ctx.flag)
            return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None

    return Reference


Scan = in_pytorch(reference.selective_scan, reference.selective_scan_backward)
Conv = in_pytorch(reference.causal_conv1d, reference.causal_conv1d_backward)


class FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs[:4])
        ctx.bits = inputs[4]
        return reference.fake_quantize(*inputs)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:4]
        grads = reference.fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits, *needs)
        return *(value if need else None for value, need in zip(grads, needs, strict=True)), None


def plain_scan(*inputs):
    return Scan.apply(*inputs)


def plain_conv(*inputs):
    return Conv.apply(*inputs)


def plain_fake_quantize(*inputs):
    return FakeQuantize.apply(*inputs)


PLAIN = {ops.selective_scan.default: plain_scan, ops.causal_conv1d.default: plain_conv}


def block(images: torch.Tensor) -> tuple[Part, list[QuantizedLinear], dict[str, torch.Tensor]]:
    """One calibrated block, its linears and its inputs."""
    model = timm.create_model("vim_small_patch16_224", depth=1).eval()
    config = QuantConfig(weight_bits=4, activation_bits=4)
    prepared = prepare(model, (images[:2],), config)
    linears = quantized_linears(prepared, [linear.name for linear in prepared_metadata(prepared).linears])
    calibrate_blocks(prepared, linears, {"x": images}, config, None, False)
    stem, part, _ = cut(prepared, [linear.node for linear in linears])
    with torch.no_grad():
        return part, linears, stem({"x": images})


def plain(part: Part) -> Part:
    """The same block, its parameters too, on the reference operators."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(part.module.graph, {}))
    for node in graph.nodes:
        if node.target in PLAIN:
            node.target = PLAIN[node.target]
    return Part(part.name, fx.GraphModule(part.module, graph), part.inputs, part.outputs)


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    part, linears, inputs = block(torch.randn(options.images, 3, 224, 224))
    for linear in linears:
        linear.input.mode = linear.weight.mode = Mode.PASS
    with torch.no_grad():
        targets = part(inputs)
    for linear in linears:
        linear.input.mode = linear.weight.mode = Mode.QUANTIZE
    learning = Learning(epochs=options.epochs, batch_size=options.images)
    clock = time.process_time if options.threads == 1 else time.perf_counter  # the first does not count other programs
    start = [(linear.input.scale, linear.weight.scale, linear.smooth.clone()) for linear in linears]
    seconds: dict[str, list[float]] = {"native": [], "reference": []}
    losses = {}
    ways = ("native", part, ops.fake_quantize), ("reference", plain(part), plain_fake_quantize)
    for _ in range(options.rounds + 1):  # the first warms up
        for name, one, fake_quantize in ways:
            for linear, (scale, weight_scale, smooth) in zip(linears, start, strict=True):
                linear.input.scale, linear.weight.scale = scale, weight_scale
                linear.smooth.data.copy_(smooth)
            with mock.patch.object(ops, "fake_quantize", fake_quantize):
                began = clock()
                losses[name] = learn_block(one, linears, inputs, targets, learning, 0, lambda *_: None)
            seconds[name].append((clock() - began) / options.epochs)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"kernels {native.isa()}, {options.threads} threads, torch {torch.__version__}, {options.images} images")
    print(", ".join(f"{name} {median:.3f} s an epoch" for name, median in medians.items()))
    print(f"ratio {medians['reference'] / medians['native']:.1f}; losses before and after {losses}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    main(parser.parse_args())
