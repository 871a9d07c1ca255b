"""Sums over images are float64: what float32 would lose still counts."""

import torch

from ptq4vm.quantizers.clusters import Statistics


def test_small_values_count_beside_large_ones_that_cancel():
    x = torch.tensor([2.0**30, 1, 1, 1, 1, -(2.0**30)]).view(1, 1, 6)
    statistics = Statistics()
    for _ in range(3):
        statistics.add(x, 1)
    assert statistics.sum.item() == 12 and statistics.size.item() == 3 * (2**31 + 4)
    assert statistics.count == 18 and statistics.largest.item() == 2**30
