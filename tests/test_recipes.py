"""Every recipe, field by field: what the papers and the released code do, written out a second time."""

import dataclasses

import pytest

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
from ptq4vm.recipes import RECIPES

EPOCHS = {2: 100, 3: 100, 4: 100, 5: 100, 6: 50, 7: 50, 8: 10}
"""PTQ4VM table 7 has 8, 6 and 4 bits; a number of bits between two of them learns as long as the lower."""

SECOND_PAPER = {"weights": {"granularity": WeightGranularity.PER_TENSOR}, "smoothing": None}
NAIVE_STATE = StateQuantization(bits=8, factors=None, per_token=False, integrate=True)
STATE = StateQuantization(bits=8, factors=Factors.MAXIMA, per_token=True, integrate=True)


def expected(epochs: int) -> dict[str, dict[str, object]]:
    learning = Learning(epochs=epochs, scale_rate=0.02, smooth_rate=0.02, loss=Loss.COSINE, batch_size=32, only=())
    released = dataclasses.replace(
        learning,
        batch_size=256,
        scale_rate=0.005,
        smooth_rate=0.01,
        only=("*.in_proj", "*.out_proj", "*.fc1", "*.fc2"),
    )
    best = dataclasses.replace(learning, epochs=10, loss=Loss.FISHER, scale_rate=0.01, smooth_rate=0.0)
    minmax, per_tensor = {"range_search": RangeSearch.MINMAX}, {"activations": {"granularity": Granularity.PER_TENSOR}}
    dynamic = {"activations": {"granularity": Granularity.PER_TOKEN_DYNAMIC}}
    symmetric = {"activations": {"granularity": Granularity.PER_TENSOR, "symmetric": True}}
    k_scaled_token = {"activations": {"granularity": Granularity.K_SCALED_TOKEN, "symmetric": True}}
    return {
        "minmax": {**minmax, **per_tensor, "smoothing": None},
        "smoothquant": {**minmax, **per_tensor},
        "per_tensor": {**per_tensor, "learning": learning},
        "per_token_dynamic": {**minmax, **dynamic, "learning": learning},
        "pts": minmax,
        "pts+truncation": {},
        "ptq4vm": {"learning": learning},
        "ptq4vm_released": {"range_search": RangeSearch.RELEASED, "learning": released},
        "best": {"rotation": True, "gptq": True, "mirror": True, "learning": best},
        "kscaled": {
            **SECOND_PAPER,
            **symmetric,
            "outputs": OutputQuantization(bits=8, k_scaled=True),
            "state": STATE,
            "bias_correction": True,
        },
        "kscaled_naive": {
            **SECOND_PAPER,
            **symmetric,
            **minmax,
            "outputs": OutputQuantization(bits=8, k_scaled=False),
            "state": NAIVE_STATE,
        },
        "kscaled_linears": {**SECOND_PAPER, **k_scaled_token, "bias_correction": True},
        "state": {"exclude": ("*",), "state": STATE},
        "state_naive": {**minmax, "exclude": ("*",), "state": NAIVE_STATE},
        "ptq4vm+state": {"learning": learning, "state": STATE},
    }


@pytest.mark.parametrize("count", EPOCHS)
def test_recipes_are_what_they_stand_for(count):
    assert expected(EPOCHS[count]).keys() == RECIPES.keys()
    for name, fields in expected(EPOCHS[count]).items():
        sections = {key: {"bits": count, **fields.get(key, {})} for key in ("weights", "activations")}
        assert QuantConfig.recipe(name, count) == QuantConfig(**fields | sections)


def test_a_config_without_arguments_is_per_token_with_truncation_at_eight_bits():
    assert QuantConfig() == QuantConfig(
        weights={"bits": 8, "granularity": "per_channel"},
        activations={"bits": 8, "granularity": Granularity.PER_TOKEN, "symmetric": False, "clusters": 4},
        power_of_two=True,
        smoothing=0.5,
        range_search=RangeSearch.SQUARED_ERROR,
        rotation=False,
        gptq=False,
        learning=None,
        mirror=False,
        seed=0,
        exclude=(),
        eight_bit=(),
        class_token_in_float=False,
        outputs=None,
        state=None,
        bias_correction=False,
    )
