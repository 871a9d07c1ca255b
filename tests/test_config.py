import dataclasses
import json

import pytest
from helpers.strategies import bits, configs, fitting
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.config import QuantConfig
from ptq4vm.quantization_specs import ActivationSpec, Granularity, IntegerRange, Learning, Loss, RangeSearch
from ptq4vm.recipes import PRESETS, RECIPES, parse


@given(bits)
def test_codes_fill_the_range_and_a_narrow_range_mirrors(count):
    low, high = IntegerRange(bits=count, narrow_range=False).bounds
    assert high - low + 1 == 2**count and low == -high - 1
    assert IntegerRange(bits=count, narrow_range=True).bounds == (-high, high)


@pytest.mark.parametrize("value", [1, 9, 0, -4, 4.0, "4", None, True])
@pytest.mark.parametrize("section", ["weights", "activations", "outputs", "state"])
def test_bits_out_of_range_are_refused_by_name(section, value):
    with pytest.raises(ValueError, match=rf"^{section}\.bits must be a whole number between 2 and 8, got {value!r}$"):
        QuantConfig(**{section: {"bits": value}})


@pytest.mark.parametrize("value", [1, 9, 4.0])
def test_a_range_of_integers_and_a_recipe_refuse_them_too(value):
    with pytest.raises(ValueError, match=f"^bits must be a whole number between 2 and 8, got {value!r}"):
        QuantConfig.recipe("pts", value)
    with pytest.raises(ValueError, match=f"^bits must be a whole number between 2 and 8, got {value!r}"):
        IntegerRange(bits=value, narrow_range=False)


@given(configs())
def test_a_config_survives_dict_and_json(config):
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert QuantConfig.from_json(config.to_json()) == config


@given(configs())
def test_a_dict_holds_only_what_json_knows(config):
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@given(configs())
def test_sections_may_be_dicts(config):
    sections = {name: getattr(config, name) for name in ("weights", "activations", "learning", "outputs", "state")}
    dicts = {name: part and dataclasses.asdict(part) for name, part in sections.items()}
    assert dataclasses.replace(config, **dicts) == config


@given(configs())
def test_the_flat_keys_of_version_1_are_translated(config):
    values = config.to_dict()
    weights, activations = values.pop("weights"), values.pop("activations")
    flat = {
        "weight_bits": weights["bits"],
        "per_tensor_weights": weights["granularity"] == "per_tensor",
        "activation_bits": activations["bits"],
        "granularity": activations["granularity"],
        "scheme": "symmetric" if activations["symmetric"] else "affine",
        "clusters": activations["clusters"],
    }
    assert QuantConfig.from_dict({**values, **flat, "format_version": 1}) == config
    del values["format_version"]
    assert QuantConfig.from_dict({**values, **flat}) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bits": 9}, "weights.bits must be a whole number between 2 and 8, got 9"),
        ({"scheme": "odd"}, "scheme must be one of affine, symmetric; got 'odd'"),
        ({"scheme": True}, "scheme must be one of"),
        ({"scheme": ["affine"]}, "scheme must be one of"),
        ({"per_tensor_weights": 1}, "per_tensor_weights must be one of False, True; got 1"),
        ({"clusters": 0}, "activations.clusters must be a whole number between 1 and 256, got 0"),
        ({"weight_bits": 4, "weights": {}}, "'weight_bits' of format version 1 and 'weights' of version 2: keep one"),
        ({"weight_bits": 4, "format_version": 2}, "config has no key 'weight_bits'"),
        ({"weights": {"bits": 4}, "format_version": 3}, "config has format version 3.*upgrade"),
    ],
    ids=repr,
)
def test_wrong_layouts_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig.from_dict(values)


def test_a_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().seed = 1
    assert len({QuantConfig.w4a4(), QuantConfig.w4a4(), QuantConfig.w4a4(seed=1)}) == 2


def test_unknown_keys_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"config has no key 'weight_bit'; it knows weights, .*exclude"):
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
        ({"activations": {"granularity": "row"}}, "activations.granularity must be one of per_tensor, .*; got 'row'"),
        ({"activations": {"granularity": "per_token_dynamic"}}, "range_search needs static scales"),
        ({"activations": {"symmetric": 1}}, "activations.symmetric must be true or false, got 1"),
        ({"activations": {"clusters": 257}}, "activations.clusters must be .* between 1 and 256, got 257"),
        ({"weights": None}, "weights must be of type WeightSpec or its keys; got None"),
        ({"weights": {"granularity": "per_token"}}, "weights.granularity must be one of per_channel, per_tensor"),
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
    assert weight.narrow_range and not activation.narrow_range
    assert config.activations.granularity is Granularity.PER_TOKEN
    assert config.smoothing == 0.5 and config.range_search is RangeSearch.SQUARED_ERROR
    assert not config.rotation and not config.gptq and not config.mirror and not config.eight_bit
    assert config.learning == Learning(epochs=epochs)


@given(bits)
def test_baselines_differ_by_smoothing_alone(count):
    minmax, smoothquant = QuantConfig.minmax(count), QuantConfig.smoothquant(count)
    assert (minmax.weights.bits, minmax.activations.bits) == (count, count)
    assert minmax.activations.granularity is Granularity.PER_TENSOR
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
    assert (config.weights.bits, config.activations.bits, config.seed) == (count, count, 3)
    assert QuantConfig.from_json(config.to_json()) == config


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"there is no recipe 'pts4'; there are minmax, .*best"):
        QuantConfig.recipe("pts4", 4)


def test_the_ladder_adds_one_thing_at_a_rung():
    rungs = [QuantConfig.recipe(name, 4) for name in ("smoothquant", "pts", "pts+truncation", "ptq4vm", "best")]
    changes = [
        {"activations": ActivationSpec(bits=4)},
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
    config = QuantConfig(weights={"bits": 4}, activations={"bits": 6}, eight_bit=("*.x_proj*", "*.dt_proj"))
    assert [(config.weight(name).bits, config.activation(name).bits) for name in ("a.x_proj_b", "a.in_proj")] == [
        (8, 8),
        (4, 6),
    ]


@given(st.sampled_from(Granularity))
def test_a_granularity_may_be_its_name(granularity):
    values = json.loads(json.dumps(fitting(granularity)))
    config = QuantConfig(**values)
    assert config.activations.granularity is granularity


def test_epochs_are_those_of_the_paper_and_between_them_those_of_fewer_bits():
    found = {bits: QuantConfig.recipe("ptq4vm", bits).learning.epochs for bits in range(2, 9)}
    assert found == {8: 10, 7: 50, 6: 50, 5: 100, 4: 100, 3: 100, 2: 100}


@pytest.mark.parametrize("name", [*PRESETS, *(f"{name}{count}" for name in RECIPES for count in (2, 8))])
def test_a_name_stands_for_a_recipe_and_its_bits(name):
    recipe, count = parse(name)
    assert name in (f"{recipe}{count}", f"w{count}a{count}")
    if name in PRESETS:
        assert getattr(QuantConfig, name)() == QuantConfig.recipe(recipe, count)


@pytest.mark.parametrize("text", ["", "4", "best", "w8a6", "pts4.json", "best44"])
def test_other_text_names_no_recipe(text):
    assert parse(text) is None


def test_a_recipe_is_described_by_one_line_of_ascii():
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.description.isascii() and "\n" not in recipe.description


def test_changes_of_a_recipe_change_only_the_keys_they_have():
    config = QuantConfig.recipe("best", 4, activations={"granularity": "per_tensor"}, learning={"epochs": 3})
    best = QuantConfig.recipe("best", 4)
    assert config.activations == dataclasses.replace(best.activations, granularity=Granularity.PER_TENSOR)
    assert config.learning == dataclasses.replace(best.learning, epochs=3)
    assert QuantConfig.recipe("best", 4, learning=None).learning is None
    assert QuantConfig.recipe("best", 4) == best
