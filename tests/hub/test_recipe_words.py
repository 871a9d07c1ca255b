import dataclasses

import pytest

from ptq4vm import QuantConfig
from ptq4vm.hub.recipe_words import in_words, recipe_name
from ptq4vm.recipes import RECIPES

QUIET = {"power_of_two", "seed", "pooled"}
"""Fields that are not in words."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_recognized_whatever_its_seed(name):
    config = QuantConfig.recipe(name, 8, seed=5)
    found = recipe_name(config)
    assert QuantConfig.recipe(found[:-1], 8, seed=5) == config
    assert recipe_name(dataclasses.replace(config, exclude=("a",))) is None


CHANGES = {
    "weights": {"bits": 4},
    "activations": {"bits": 6},
    "smoothing": 0.25,
    "range_search": "released",
    "rotation": True,
    "gptq": True,
    "learning": {"epochs": 3},
    "mirror": True,
    "exclude": ("a|b",),
    "eight_bit": ("c",),
    "class_token_in_float": True,
    "outputs": {"bits": 6},
    "state": {"bits": 6},
    "bias_correction": True,
}


def test_every_field_but_the_quiet_ones_is_changed_here():
    assert {field.name for field in dataclasses.fields(QuantConfig)} == CHANGES.keys() | QUIET


@pytest.mark.parametrize("field", CHANGES)
def test_every_choice_is_told(field):
    config = QuantConfig.from_dict({field: CHANGES[field]})
    assert in_words(config) != in_words(QuantConfig())


def test_what_is_not_done_is_not_said():
    assert in_words(QuantConfig.minmax(8)) == {
        "Recipe": "minmax8",
        "Weights": "8 bits, per channel",
        "Activations": "8 bits, per tensor, static ranges, affine",
        "Range search": "minmax",
    }
