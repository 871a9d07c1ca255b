"""Bounds of a GPU, against the bounds that were worked out by hand for a 3090 and an H200."""

import pytest
import torch
from helpers.strategies import normal
from torch import fx, nn

from benchmarks.speed import bounds
from benchmarks.speed.bounds import GPUS
from ptq4vm import ops
from ptq4vm.graph.insert import aten

ROWS = 32 * 197
BY_HAND = {  # K, N: µs at 16, 8 and 4 bits on a 3090, then on an H200, which multiplies 4 bits as 8
    (192, 768): ((26.2, 11.8, 11.1), (2.6, 2.3, 2.2)),
    (384, 44): ((5.8, 3.2, 1.9), (1.1, 0.6, 0.4)),
    (12, 384): ((5.3, 5.3, 5.3), (1.0, 1.0, 1.0)),
    (384, 1536): ((104.7, 26.2, 22.3), (7.5, 4.7, 4.3)),
    (768, 384): ((52.4, 13.1, 7.9), (3.8, 2.1, 1.9)),
    (768, 3072): ((419, 104.7, 52.4), (30.0, 15.0, 15.0)),
    (1536, 768): ((209.5, 52.4, 26.2), (15.0, 7.5, 7.5)),
}


@pytest.mark.parametrize("sizes", BY_HAND, ids=str)
@pytest.mark.parametrize("place, name", list(enumerate(["RTX 3090", "H200"])))
def test_linears_are_bound_as_by_hand(sizes, place, name):
    found = [1e6 * bounds.linear(GPUS[name], ROWS, *sizes, bits) for bits in (16, 8, 4)]
    assert found == pytest.approx(BY_HAND[sizes][place], abs=0.1, rel=0.002)


@pytest.mark.parametrize("name, microseconds", [("RTX 3090", 69), ("H200", 40)])
def test_scans_are_bound_by_their_exponentials(name, microseconds):
    """Vim-S, batch 32, both directions."""
    u, projected = torch.empty(64, 197, 768, dtype=torch.bfloat16), torch.empty(64, 197, 16, dtype=torch.bfloat16)
    inputs = (u, u, torch.empty(768, 16), projected, projected)

    def build(graph, *inputs):
        return graph.call_function(ops.selective_scan.default, (*inputs, None, None, None, True))

    found = 1e6 * bounds.graph(GPUS[name], graph_of(build, *inputs), *inputs)
    assert found == pytest.approx(microseconds, rel=0.015)


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_a_gpu_is_known_by_the_drivers_name(name, key):
    assert bounds.known(name) == GPUS[key]


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA GH200", "GeForce RTX 30900"])
def test_another_one_is_not_taken_for_it(name):
    assert bounds.known(name) is None


def graph_of(build, *inputs):
    graph = fx.Graph()
    graph.output(build(graph, *(graph.placeholder(f"x{i}") for i in range(len(inputs)))))
    return fx.GraphModule(nn.Module(), graph)


def test_a_graph_reads_and_writes_each_tensor_once_and_views_are_free():
    x = normal(2, 50, 64)

    def build(graph, x):
        part = graph.call_function(aten.slice.Tensor, (x, 2, 0, 32))
        both = graph.call_function(aten.mul.Tensor, (part, part))
        return graph.call_function(aten.view.default, (both, [100, 32]))

    size = 2 * 2 * 50 * 32 * 4
    assert bounds.graph(GPUS["H200"], graph_of(build, x), x) == pytest.approx(size / 4800e9)


def test_a_linear_of_codes_is_bound_by_its_products():
    """Where they are many, and read as nibbles where the weight holds some."""
    x, weight = torch.zeros(1, 512, 8192, dtype=torch.int8), torch.zeros(8192, 4096, dtype=torch.uint8)
    one = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    rest = torch.zeros(8192, dtype=torch.int32), torch.ones(8192)

    def seconds(weight):
        def build(graph, *inputs):
            return graph.call_function(ops.linear_packed.default, (*inputs, None, torch.bfloat16))

        inputs = (x, *one, weight, *rest)
        return bounds.graph(GPUS["RTX 3090"], graph_of(build, *inputs), *inputs)

    products = 2 * 512 * 8192 * 8192
    assert seconds(weight) == pytest.approx(products / 568e12)
    assert seconds(torch.zeros(8192, 8192, dtype=torch.int8)) == pytest.approx(products / 284e12)


def test_a_directional_scan_is_bound_by_all_its_states():
    K, B, L, E, R, S = 2, 3, 40, 256, 8, 16
    qparams = torch.ones(K, L), torch.ones(K, L), torch.zeros(K, L, dtype=torch.int32)
    weight = (
        torch.zeros(K, E // 16, 1, 16, 64, dtype=torch.int8),
        torch.zeros(K, E, dtype=torch.int32),
        torch.ones(K, E),
    )
    order = torch.arange(L).repeat(K, 1).int()
    steps = (normal(1, B, L, E), normal(K, B, L, R + 2 * S), *qparams, None, 8, *weight, torch.ones(K, E))
    arguments = (*steps, -torch.ones(K, E, S), torch.ones(K, E), None, order, True, 1.0)
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]

    def build(graph, *inputs):
        given = iter(inputs)
        values = [next(given) if isinstance(value, torch.Tensor) else value for value in arguments]
        return graph.call_function(ops.directional_scan.default, tuple(values))

    slow = bounds.GPU(bandwidth=1e9, half=1, int8=1, int4=None, processors=4, clock=0.001)
    found = bounds.graph(slow, graph_of(build, *tensors), *tensors)
    assert found == pytest.approx(K * B * L * E * S / 16 / 4e6)
