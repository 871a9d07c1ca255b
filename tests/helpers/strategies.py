"""Draws that the laws are tried on: empty, single and odd sizes, all numbers of bits, tensors in any layout."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ptq4vm.config import QuantConfig
from ptq4vm.quantization_specs import (
    Factors,
    Granularity,
    Learning,
    Loss,
    OutputQuantization,
    RangeSearch,
    StateQuantization,
    WeightGranularity,
)

EVERYTHING = QuantConfig(
    weights={"bits": 4},
    activations={"bits": 4},
    rotation=True,
    gptq=True,
    mirror=True,
    learning=Learning(epochs=2, batch_size=5, loss=Loss.FISHER),
    eight_bit=("*.x_proj*",),
)
"""Every option of a config at once."""

bits = st.integers(2, 8)
seeds = st.integers(0, 2**31 - 1)
sizes = st.sampled_from([0, 1, 2, 3, 5, 8, 17])
positive_sizes = st.sampled_from([1, 2, 3, 5, 8, 17])


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _every_other(x: Tensor) -> Tensor:
    return torch.stack((x, torch.zeros_like(x)), -1)[..., 0]


def _part_of_more(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x), x), -1)[..., x.shape[-1] :]


layouts = st.sampled_from([Tensor.contiguous, _transposed, _every_other, _part_of_more])
"""Functions that give a tensor's values back in other memory."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """int8 codes in [low, high]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)


def powers_of_two(*shape: int, seed: int = 0, low: int = -6, high: int = 3) -> Tensor:
    """Factors whose product with a float32 is exact."""
    return 2.0 ** integers(low, high, *shape, seed=seed).float()


def fitting(granularity: Granularity, **activations: Any) -> dict[str, Any]:
    """Returns the other keys that a config needs with a granularity; more of the activations."""
    found: dict[str, Any] = {"activations": {"granularity": granularity, **activations}}
    if granularity is Granularity.PER_TOKEN_DYNAMIC:
        found["range_search"] = False
    if granularity.k_scaled:
        found["activations"]["symmetric"] = True
    if granularity is Granularity.K_SCALED_CHANNEL:
        found["smoothing"] = None
    return found


@st.composite
def configs(draw: st.DrawFn) -> QuantConfig:
    granularity = draw(st.sampled_from(Granularity))
    rates = st.floats(0, 1, exclude_max=True)
    learning = st.builds(
        Learning,
        epochs=st.integers(1, 1000),
        scale_rate=rates,
        smooth_rate=rates,
        loss=st.sampled_from(Loss),
        batch_size=st.integers(1, 512),
        only=st.lists(st.text(max_size=9), max_size=2).map(tuple),
    )
    outputs = draw(st.none() | st.builds(OutputQuantization, bits=bits, k_scaled=st.booleans()))
    several = granularity is Granularity.K_SCALED_CHANNEL
    searches = {
        granularity is Granularity.PER_TOKEN_DYNAMIC: [RangeSearch.MINMAX],
        granularity.k_scaled: [RangeSearch.MINMAX, RangeSearch.SQUARED_ERROR],
    }.get(True, list(RangeSearch))
    gptq = draw(st.booleans())
    return QuantConfig(
        weights={"bits": draw(bits), "granularity": draw(st.sampled_from(WeightGranularity))},
        activations={
            "bits": draw(bits),
            "granularity": granularity,
            "symmetric": granularity.k_scaled,
            "clusters": draw(st.integers(1, 256)),
        },
        power_of_two=draw(st.booleans()),
        smoothing=None if several else draw(st.none() | st.floats(0, 1)),
        range_search=draw(st.sampled_from(searches)),
        rotation=outputs is None and draw(st.booleans()),
        gptq=gptq,
        mirror=draw(st.booleans()),
        learning=None if outputs else draw(st.none() | learning),
        class_token_in_float=draw(st.booleans()),
        outputs=outputs,
        state=draw(
            st.none()
            | st.builds(
                StateQuantization,
                bits=bits,
                factors=st.sampled_from([*Factors, None]),
                per_token=st.booleans(),
                integrate=st.booleans(),
            )
        ),
        bias_correction=not gptq and draw(st.booleans()),
        seed=draw(seeds),
        exclude=tuple(draw(st.lists(st.text(max_size=9), max_size=3))),
        eight_bit=tuple(draw(st.lists(st.text(max_size=9), max_size=3))),
    )
