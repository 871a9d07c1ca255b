"""Pipelines: what they print, and that every pass's result is cleaned up and verified against its stage."""

from dataclasses import dataclass

import pytest
import torch
from helpers.graphs import canonical
from torch import nn

from ptq4vm import QuantConfig, ops
from ptq4vm.graph.insert import Insertion, aten
from ptq4vm.graph.pipeline import Pipeline
from ptq4vm.graph.verify import CONTENTS, GraphStage, verify
from ptq4vm.passes.lower.pipeline import fusing_pipeline, lowering_pipeline
from ptq4vm.passes.prepare.pipeline import preparation_pipeline
from ptq4vm.quantizers import quantized_decomposed

IMAGES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gm():
    return canonical(nn.Sequential(nn.Linear(8, 4)), IMAGES)


def quantize_input(gm):
    """Leaves an integer operator and a dead node."""
    linear = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    insert = Insertion(gm, linear)
    one, zero = insert.tensor("one", torch.ones(1)), insert.tensor("zero", torch.zeros(1, dtype=torch.int32))
    insert.call(aten.relu.default, linear.args[0])
    codes = insert.call(ops.quantize.default, linear.args[0], one, zero, None, 8)
    linear.update_arg(0, insert.call(ops.dequantize.default, codes, one, zero))
    return gm


@dataclass(frozen=True)
class Nothing:
    count: int

    def __call__(self, gm):
        return gm


@pytest.mark.parametrize("stage", GraphStage)
def test_an_operator_that_its_stage_has_not_is_named_with_the_pass(gm, stage):
    pipeline = Pipeline(stage, (Nothing(1), quantize_input))
    if "quantize" in CONTENTS[stage].operators:
        targets = {node.target for node in pipeline(gm).graph.nodes}
        assert ops.quantize.default in targets and aten.relu.default not in targets  # dead code is gone
    else:
        with pytest.raises(
            RuntimeError, match=rf"^quantize_input left .*ptq4vm\.quantize.* in a graph that is {stage}"
        ):
            pipeline(gm)


@pytest.mark.parametrize("stage", GraphStage)
def test_torchaos_quantize_nodes_have_their_stages(gm, stage):
    output = gm.graph.output_node()
    (value,) = output.all_input_nodes
    codes = Insertion(gm, output).call(
        quantized_decomposed.quantize_per_tensor.default, value, 1.0, 0, -128, 127, torch.int8
    )
    output.update_arg(0, (codes,))
    if CONTENTS[stage].qdq:
        assert verify(gm, stage, "it") is gm
    else:
        with pytest.raises(RuntimeError, match=r"it left .*quantize_per_tensor.*has no place"):
            verify(gm, stage, "it")


@pytest.mark.parametrize("stage", GraphStage)
def test_modules_are_for_prepared_graphs_if_they_are_fake_quantizers(gm, stage):
    gm.add_submodule("extra", nn.ReLU())
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.update_arg(0, (gm.graph.call_module("extra", (output.all_input_nodes[0],)),))
    if CONTENTS[stage].traced:
        assert verify(gm, stage, "it") is gm
    else:
        with pytest.raises(RuntimeError, match=r"it left .*extra.* such calls have no place"):
            verify(gm, stage, "it")


def test_pipelines_print_their_passes_in_order():
    inner = Pipeline(GraphStage.QDQ, (quantize_input,))
    assert (
        str(Pipeline(GraphStage.LOWERED, (inner, Nothing(3))))
        == "lowered\n  qdq\n    quantize_input\n  Nothing(count=3)"
    )


def test_a_config_has_the_passes_that_it_asks_for():
    def names(pipeline):
        return [line.strip() for line in str(pipeline).split("\n")]

    plain, best = QuantConfig.minmax(8), QuantConfig.w4a4(best=True)
    assert {"insert_smoothing", "insert_rotation"}.isdisjoint(names(preparation_pipeline(plain)))
    assert {"insert_smoothing", "insert_rotation"} <= {*names(preparation_pipeline(best))}
    kscaled = names(preparation_pipeline(QuantConfig.kscaled()))
    assert kscaled.index("decompose_fused_ops") < kscaled.index("SelectSites()") < kscaled.index("insert_corrections")
    assert names(lowering_pipeline(plain, integers=False)) == names(lowering_pipeline(plain))[1:-1]
    assert len(names(fusing_pipeline(torch.bfloat16))) == len(names(fusing_pipeline())) + 2
