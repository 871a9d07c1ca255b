"""Choosing linears, and what is said of those that a pattern could have meant."""

import pytest
import torch
from torch import nn

from ptq4vm import QuantConfig, prepare


class Chain(nn.Sequential):
    def __init__(self, count: int) -> None:
        super().__init__(*(nn.Linear(4, 4) for _ in range(count)))


@pytest.mark.parametrize(("count", "end"), [(2, "0, 1"), (6, "0, 1, 2, 3, 4, 5"), (7, "0, 1, 2, 3, 4, 5, …")])
@pytest.mark.parametrize("key", ["exclude", "eight_bit"])
def test_a_pattern_that_matches_nothing_is_answered_with_six_names_at_most(count, end, key):
    with pytest.raises(ValueError) as error:
        prepare(Chain(count), (torch.ones(2, 3, 4),), QuantConfig(**{key: ("nothing",)}))
    assert str(error.value) == f"{key} pattern 'nothing' matches no linear; there are {end}"
