"""A law of some operators: what its strategies draw, and a check of the results; `law` registers one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from helpers.draws import HALF


@dataclass(frozen=True)
class Law:
    operators: frozenset[str]
    drawn: Mapping[str, st.SearchStrategy]
    check: Callable[..., None]

    def arguments(self) -> st.SearchStrategy:
        return st.fixed_dictionaries(dict(self.drawn))


LAWS: dict[str, Law] = {}

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
IMAGES, TOKENS = st.integers(0, 2), st.sampled_from([0, 1, 2, 17])
CHANNELS = st.sampled_from([1, 7, 16, 24, 33, 64, 96])
FEATURES = st.sampled_from([0, 1, 7, 16, 44, 65])
KINDS = st.sampled_from(["tensor", "token", "image"])
BITS, WEIGHT_BITS = st.integers(2, 8), st.sampled_from([4, 8])
SEEDS, FLAG = st.integers(0, 2**20), st.booleans()


def law(*operators: str, **drawn: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(check: Callable[..., None]) -> Callable[..., None]:
        LAWS[check.__name__] = Law(frozenset(operators), drawn, check)
        return check

    return register


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.bfloat16: HALF, torch.float16: 2**-10}[dtype]
