import dataclasses
import json

import pytest
from helpers.strategies import bits, configs, fitting
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.config import (
    RECIPES,
    Granularity,
    Learning,
    Loss,
    QuantConfig,
    QuantSpec,
    RangeSearch,
    Scheme,
)


@given(bits)
def test_affine_codes_fill_the_range_and_symmetric_codes_mirror(count):
    low, high = QuantSpec(bits=count, scheme=Scheme.AFFINE).bounds
    assert high - low + 1 == 2**count and low == -high - 1
    assert QuantSpec(bits=count, scheme=Scheme.SYMMETRIC).bounds == (-high, high)


@pytest.mark.parametrize("value", [1, 9, 0, -4, 4.0, "4", None, True])
@pytest.mark.parametrize("name", ["weight_bits", "activation_bits"])
def test_bits_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number between 2 and 8, got {value!r}"):
        QuantConfig(**{name: value})


@pytest.mark.parametrize("value", [1, 9, 4.0])
def test_a_spec_refuses_them_too(value):
    with pytest.raises(ValueError, match=f"bits must be a whole number between 2 and 8, got {value!r}"):
        QuantSpec(bits=value, scheme=Scheme.AFFINE)


@given(configs())
def test_a_config_survives_dict_and_json(config):
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert QuantConfig.from_json(config.to_json()) == config


@given(configs())
def test_a_dict_holds_only_what_json_knows(config):
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@given(configs())
def test_learning_may_be_a_dict(config):
    if config.learning is not None:
        assert dataclasses.replace(config, learning=dataclasses.asdict(config.learning)) == config


def test_a_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().seed = 1
    assert len({QuantConfig.w4a4(), QuantConfig.w4a4(), QuantConfig.w4a4(seed=1)}) == 2


def test_unknown_keys_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"config has no key 'weight_bit'; it knows weight_bits, .*exclude"):
        QuantConfig.from_dict({"weight_bit": 4})
    with pytest.raises(ValueError, match=r"learning has no key 'epoch'; it knows epochs, .*batch_size"):
        QuantConfig.from_dict({"learning": {"epochs": 1, "epoch": 2}})


@pytest.mark.parametrize("text", ["[]", "3", '"w4a4"', "null"])
def test_json_of_another_kind_is_refused(text):
    with pytest.raises(ValueError, match="a config is a JSON object"):
        QuantConfig.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing": 1.5}, r"smoothing must be None or in \[0, 1\]; got 1.5"),
        ({"smoothing": -0.1}, "smoothing must be"),
        ({"smoothing": float("nan")}, "smoothing must be"),
        ({"smoothing": "0.5"}, "smoothing must be None or in"),
        ({"smoothing": True}, "smoothing must be"),
        ({"granularity": "per_channel"}, "granularity must be one of per_tensor, .*; got 'per_channel'"),
        ({"granularity": "per_token_dynamic"}, "range_search needs static scales"),
        ({"seed": -1}, "seed must be a non-negative integer of 63 bits; got -1"),
        ({"seed": 2**63}, "seed must be a non-negative integer of 63 bits; got 9223372036854775808"),
        ({"seed": 0.5}, "seed must be"),
        ({"seed": None}, "seed must be"),
        ({"exclude": "layers.*"}, r"exclude must be a sequence of patterns, got 'layers\.\*'"),
        ({"exclude": (3,)}, r"exclude must hold patterns of linears' names, got \[3\]"),
        ({"exclude": None}, "exclude must be a sequence of patterns, got None"),
        ({"range_search": "off"}, "range_search must be one of minmax, squared_error, released; got 'off'"),
        ({"learning": "on"}, "learning must be of type Learning, its keys, or None; got 'on'"),
        ({"learning": {}}, "learning needs the key 'epochs'"),
        ({"learning": {"epochs": 0}}, "learning.epochs must be at least 1; for no learning use learning=None"),
        ({"learning": {"epochs": 1.5}}, "learning.epochs must be"),
        ({"learning": {"epochs": None}}, "learning.epochs must be"),
        ({"learning": {"epochs": 1, "batch_size": 0}}, "learning.batch_size must be at least 1; got 0"),
        ({"learning": {"epochs": 1, "scale_rate": 1}}, r"learning.scale_rate must be in \[0, 1\); got 1"),
        ({"learning": {"epochs": 1, "smooth_rate": -0.1}}, "learning.smooth_rate must be"),
        ({"learning": {"epochs": 1, "smooth_rate": "fast"}}, "learning.smooth_rate must be"),
        ({"learning": {"epochs": 1, "loss": "mse"}}, "learning.loss must be one of cosine, fisher; got 'mse'"),
        ({"learning": {"epochs": 1, "only": "*.in_proj"}}, "learning.only must be a sequence of patterns"),
        ({"state": {"factors": "means"}}, "state.factors must be one of maxima, powers; got 'means'"),
        ({"gptq": 1}, "gptq must be true or false, got 1"),
        ({"rotation": None}, "rotation must be true or false, got None"),
        ({"mirror": "yes"}, "mirror must be true or false, got 'yes'"),
        ({"eight_bit": "*.x_proj"}, "eight_bit must be a sequence of patterns"),
    ],
    ids=repr,
)
def test_what_makes_no_sense_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig(**changes)


@pytest.mark.parametrize(
    ("config", "count", "epochs"),
    [(QuantConfig.w8a8(), 8, 10), (QuantConfig.w6a6(), 6, 50), (QuantConfig.w4a4(), 4, 100)],
)
def test_presets_are_the_papers(config, count, epochs):
    weight, activation = config.weight("in_proj"), config.activation("in_proj")
    assert (weight.bits, activation.bits) == (count, count)
    assert (weight.scheme, activation.scheme) == (Scheme.SYMMETRIC, Scheme.AFFINE)
    assert config.granularity is Granularity.PER_TOKEN
    assert config.smoothing == 0.5 and config.range_search is RangeSearch.SQUARED_ERROR
    assert not config.rotation and not config.gptq and not config.mirror and not config.eight_bit
    assert config.learning == Learning(epochs=epochs)


@given(bits)
def test_baselines_differ_by_smoothing_alone(count):
    minmax, smoothquant = QuantConfig.minmax(count), QuantConfig.smoothquant(count)
    assert (minmax.weight_bits, minmax.activation_bits) == (count, count)
    assert minmax.granularity is Granularity.PER_TENSOR
    assert minmax.range_search is RangeSearch.MINMAX and minmax.learning is None and minmax.smoothing is None
    assert smoothquant == dataclasses.replace(minmax, smoothing=0.5)


@pytest.mark.parametrize("preset", ["w8a8", "w6a6", "w4a4"])
def test_a_preset_can_be_changed(preset):
    make = getattr(QuantConfig, preset)
    assert make(learning=None, seed=3) == dataclasses.replace(make(), learning=None, seed=3)
    assert QuantConfig.minmax(4, seed=3) == dataclasses.replace(QuantConfig.minmax(4), seed=3)


@given(st.sampled_from(sorted(RECIPES)), bits)
def test_every_recipe_is_a_config_at_all_bits(name, count):
    config = QuantConfig.recipe(name, count, seed=3)
    assert (config.weight_bits, config.activation_bits, config.seed) == (count, count, 3)
    assert QuantConfig.from_json(config.to_json()) == config


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"there is no recipe 'pts4'; there are minmax, .*best"):
        QuantConfig.recipe("pts4", 4)


def test_the_ladder_adds_one_thing_at_a_rung():
    rungs = [QuantConfig.recipe(name, 4) for name in ("smoothquant", "pts", "pts+truncation", "ptq4vm", "best")]
    changes = [
        {"granularity": Granularity.PER_TOKEN},
        {"range_search": RangeSearch.SQUARED_ERROR},
        {"learning": Learning(epochs=100)},
        {
            "rotation": True,
            "gptq": True,
            "mirror": True,
            "learning": Learning(epochs=10, loss=Loss.FISHER, scale_rate=1e-2, smooth_rate=0.0),
        },
    ]
    for lower, upper, change in zip(rungs, rungs[1:], changes, strict=False):
        assert upper == dataclasses.replace(lower, **change)
    assert rungs[-1] == QuantConfig.w4a4(best=True) and rungs[-2] == QuantConfig.w4a4()


def test_what_goes_past_the_paper_is_off_in_the_papers_preset():
    learning = QuantConfig.w4a4().learning
    assert learning.loss is Loss.COSINE and not learning.only


@given(st.booleans())
def test_a_range_search_may_be_true_or_false(search):
    want = RangeSearch.SQUARED_ERROR if search else RangeSearch.MINMAX
    assert QuantConfig(range_search=search).range_search is want


def test_linears_named_for_eight_bits_get_them():
    config = QuantConfig(weight_bits=4, activation_bits=6, eight_bit=("*.x_proj*", "*.dt_proj"))
    assert [(config.weight(name).bits, config.activation(name).bits) for name in ("a.x_proj_b", "a.in_proj")] == [
        (8, 8),
        (4, 6),
    ]


@given(st.sampled_from(Granularity))
def test_a_granularity_may_be_its_name(granularity):
    config = QuantConfig(**fitting(granularity) | {"granularity": str(granularity)})
    assert config.granularity is granularity


def test_epochs_are_those_of_the_paper_and_between_them_those_of_fewer_bits():
    found = {bits: QuantConfig.recipe("ptq4vm", bits).learning.epochs for bits in range(2, 9)}
    assert found == {8: 10, 7: 50, 6: 50, 5: 100, 4: 100, 3: 100, 2: 100}
