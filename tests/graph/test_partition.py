"""Graphs whose blocks do not stand in a row: branches, shared inputs, outputs on the way, outputs without a batch."""

import dataclasses
import itertools

import pytest
import torch
from helpers.small_models import BEST, LEARNED, Block, Raw, blocks
from helpers.strategies import normal
from torch.utils._pytree import tree_leaves

from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.graph.partition import partition_blocks
from ptq4vm.metadata import metadata_of
from ptq4vm.passes.quantized_nodes import quantized_linears

X = normal(8, 5, 8)


def early(m, x):
    y = m.layers[0](x)
    return y, m.head(m.layers[1](y).mean(1))


def dense(m, x):
    y = m.layers[0](x)
    return m.head((m.layers[1](x) + y).mean(1))


FLOWS = {
    "in a row": None,
    "two branches": lambda m, x: (m.layers[0](x), m.layers[1](x)),
    "one sum": lambda m, x: m.head((m.layers[0](x) + m.layers[1](x)).mean(1)),
    "dense": dense,
    "an output on the way": early,
    "a scalar from a dead end": lambda m, x: (m.head(m.layers[1](x).mean(1)), m.layers[0](x).mean()),
    "scalars alone": lambda m, x: m.layers[1](m.layers[0](x)).mean() + 1,
    "a mean over images": lambda m, x: m.layers[1](m.layers[0](x)).mean(0),
    "classes alone": lambda m, x: m.head(m.layers[1](m.layers[0](x)).mean(1)).argmax(1),
    "a class from a dead end": lambda m, x: (m.layers[0](x).argmax(1), m.head(m.layers[1](x).mean(1))),
    "no gradient": lambda m, x: m.head(m.layers[1](m.layers[0](x).detach()).mean(1)).detach(),
}
CONFIGS = {
    "minmax": QuantConfig.minmax(8),
    "ptq4vm": dataclasses.replace(LEARNED, weights={"bits": 8}, activations={"bits": 8}),
    "best": dataclasses.replace(BEST, weights={"bits": 8}, activations={"bits": 8}),
    "kscaled": dataclasses.replace(QuantConfig.kscaled(8), state=None),
}


FAST = {("dense", Raw, "minmax"), ("dense", Raw, "kscaled")} | {
    (flow, Block, "best") for flow in FLOWS if flow not in ("in a row", "one sum", "dense", "a mean over images")
}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(FLOWS, (Block, Raw), CONFIGS)
]


@pytest.mark.parametrize(("flow", "block", "name"), CASES)
def test_any_flow_is_calibrated_and_stays_near(flow, block, name):
    model = blocks(block=block, flow=FLOWS[flow])
    prepared = prepare(model, (X[:2],), CONFIGS[name])
    calibrate(prepared, X.split(3), progress=False)
    want = tree_leaves(model(X))
    floats = convert(prepared, lower=False)
    assert all(torch.equal(*pair) for pair in zip(tree_leaves(prepared(X)), tree_leaves(floats(X)), strict=True))
    for found, exact in zip(tree_leaves(convert(prepared)(X)), want, strict=True):
        if exact.is_floating_point():
            assert 0 < (found - exact).norm() < 0.05 * exact.norm()
        else:
            assert (found == exact).float().mean() > 0.9


class Reducing(Block):
    """Hands on its result or, where asked, only what it comes down to."""

    def forward(self, x, reduce=None):
        y = super().forward(x)
        return y if reduce is None else reduce(y)


@pytest.mark.parametrize("reduce", [torch.Tensor.mean, lambda y: y.argmax(1), lambda y: y.mean((0, 1)).argmax()])
def test_a_block_learns_from_what_its_output_is_computed_from(reduce):
    """Where that has no batch, or no gradient."""
    model = blocks(block=Reducing, flow=lambda m, x: (m.head(m.layers[1](x).mean(1)), m.layers[0](x, reduce)))
    prepared = prepare(model, (X[:2],), LEARNED)
    report = metadata_of(calibrate(prepared, [X], progress=False)).blocks
    assert {block["block"] for block in report} == {"layers.0", "layers.1"}
    assert all(0 < block["loss_after"] <= block["loss_before"] and block["cosine_loss"] > 0 for block in report)


@pytest.mark.parametrize("flow", ["one sum", "dense"])
@pytest.mark.parametrize("name", ["minmax", "kscaled"])
def test_each_block_has_a_quantizer_of_its_own_for_the_tensor_that_they_share(flow, name):
    prepared = prepare(blocks(block=Raw, flow=FLOWS[flow]), (X,), CONFIGS[name])
    linears = quantized_linears(prepared)
    inputs = {linear.name: linear.input for linear in linears}
    assert inputs["layers.0.a"] is inputs["layers.0.b"] and inputs["layers.1.a"] is inputs["layers.1.b"]
    assert inputs["layers.0.a"] is not inputs["layers.1.a"]


@pytest.mark.parametrize("flow", FLOWS)
def test_the_pieces_compute_the_graph(flow):
    """And hand on what it returns: all images at once, or a few."""
    model = blocks(flow=FLOWS[flow])
    prepared = prepare(model, (X,), LEARNED)
    linears = quantized_linears(prepared)
    values, returned = {"x": X}, {}
    for part in partition_blocks(prepared, [linear.node for linear in linears]):
        values |= part({name: values[name] for name in part.inputs})
        returned |= {name: values[name] for name in part.results}
        assert all(len(values[name]) == len(X) for name in part.outputs)
    names = [node.name for node in prepared.graph.output_node().all_input_nodes]
    assert names and set(names) == set(returned)
    for name, want in zip(names, tree_leaves(model(X)), strict=True):
        assert torch.equal(returned[name], want)
