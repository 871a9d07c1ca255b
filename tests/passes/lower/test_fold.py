"""What is computed from parameters alone becomes a tensor, but for operators that are to be kept."""

import torch
from helpers.portable_models import quantized_model

from ptq4vm import QuantConfig
from ptq4vm.passes.lower.fold import FoldConstants
from ptq4vm.quantizers import quantized_decomposed

DEQUANTIZE = quantized_decomposed.dequantize_per_channel.default


def kept(gm):
    return len(gm.graph.find_nodes(op="call_function", target=DEQUANTIZE))


def test_operators_that_are_kept_are_not_folded():
    config = QuantConfig(range_search=False, outputs={"bits": 8})  # convolutions' weights are dequantized in the graph
    quantized, inputs = quantized_model("picture", config)
    with torch.no_grad():
        expected = quantized(*inputs)
    count = kept(quantized)
    assert count > 0
    folded = FoldConstants(keep=(DEQUANTIZE,))(quantized)
    folded.graph.eliminate_dead_code()
    folded.recompile()
    assert kept(folded) == count
    with torch.no_grad():
        assert torch.equal(folded(*inputs), expected)
    everything = FoldConstants()(folded)
    everything.graph.eliminate_dead_code()
    assert kept(everything) == 0
