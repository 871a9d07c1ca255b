import csv
import json
import math

import pytest
import torch
from helpers.strategies import fitting
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ptq4vm
from ptq4vm.config import QuantConfig
from ptq4vm.formatting import linear_rows, model_bytes, table, to_json, write_csv, write_json
from ptq4vm.metadata import metadata_of
from ptq4vm.quantization_specs import Granularity

words = st.text("abcxyz", min_size=1, max_size=8)
rows = st.lists(st.dictionaries(words, st.none() | words | st.integers() | st.floats()), max_size=5)


@given(rows.filter(any))
def test_every_column_of_a_table_has_one_width(values):
    heading, rule, *body = table(values).split("\n")
    assert set(rule) <= {"-", " "} and len(body) == len(values)
    assert all(len(line) <= len(rule) for line in (heading, *body))
    gaps = [place for place, mark in enumerate(rule) if mark == " "]
    assert all(line.ljust(len(rule))[place] == " " for line in body for place in gaps)


def test_numbers_stand_right_and_words_left():
    values = [{"name": "a", "ms": 1.5, "bytes": 1234567}, {"name": "long", "ms": None, "bytes": 8}]
    assert table(values, {"name": "model", "bytes": "size", "ms": "ms"}) == (
        "model       size   ms\n-----  ---------  ---\na      1,234,567  1.5\nlong           8    -"
    )


def test_a_table_without_rows_is_its_heading():
    assert table([], {"name": "model"}) == "model\n-----"
    assert table([]) == "\n"


@given(value=st.dictionaries(words, st.integers() | words | st.lists(st.floats(allow_nan=False, allow_infinity=False))))
def test_json_survives_a_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "new" / "value.json"
    write_json(path, value)
    assert json.loads(path.read_text()) == value
    assert list(path.parent.iterdir()) == [path]


@given(st.recursive(st.floats(), lambda inner: st.lists(inner) | st.dictionaries(words, inner)))
def test_json_has_no_words_of_its_own(value):
    """NaN and infinity become null: strict readers refuse the file otherwise."""

    def refuse(word):
        raise AssertionError(word)

    json.loads(to_json({"value": value}), parse_constant=refuse)
    assert to_json([math.nan, math.inf, 1.5, (-math.inf,)]) == json.dumps([None, None, 1.5, [None]], indent=2)


def test_csv_has_the_keys_of_all_rows(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"a": 1, "b": "x, y"}, {"a": 2, "c": None}])
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"a": "1", "b": "x, y", "c": ""},
            {"a": "2", "b": "", "c": ""},
        ]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, [1])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, [object()])
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_bytes_of_a_model_are_those_of_its_tensors(inputs, outputs, dtype):
    model = nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype), nn.Identity())
    model[1].register_buffer("codes", torch.zeros(7, dtype=torch.int8))
    assert model_bytes(model) == dtype.itemsize * (inputs + 1) * outputs + 7
    model.append(model[0])  # the same weights again
    assert model_bytes(model) == dtype.itemsize * (inputs + 1) * outputs + 7


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("smoothing, weight_bits", [(None, 8), (0.5, 4)])
def test_the_rows_of_a_graph_are_its_linears(small_vim, images, granularity, smoothing, weight_bits):
    rest = {"smoothing": smoothing, "range_search": False} | fitting(granularity)
    config = QuantConfig(weights={"bits": weight_bits}, **rest)
    quantized = ptq4vm.quantize(small_vim, [images], config, progress=False)
    found = linear_rows(quantized)
    assert [(row["name"], row["tokens"], row["in"], row["out"]) for row in found] == [
        (linear.name, linear.tokens, linear.in_features, linear.out_features)
        for linear in metadata_of(quantized).linears
    ]
    for row in found:
        assert row["weight_bytes"] == row["out"] * (-(-row["in"] // 2) if weight_bits == 4 else row["in"])
        assert (row["weight_bits"], row["activation_bits"]) == (weight_bits, 8)
        assert row["granularity"] == granularity
        if granularity is Granularity.PER_TOKEN_DYNAMIC:
            assert row["input_scale_min"] is row["input_scale_max"] is None
        else:
            assert 0 < row["input_scale_min"] <= row["input_scale_max"]
            assert granularity.static_per_token or row["input_scale_min"] == row["input_scale_max"]
        steps_of_channels = granularity is Granularity.K_SCALED_CHANNEL
        assert smoothing is not None or steps_of_channels or row["smooth_min"] is None
    assert smoothing is None or any(0 < (row["smooth_min"] or 0) < row["smooth_max"] for row in found)
    assert json.loads(json.dumps(found)) == found
    assert model_bytes(quantized) < model_bytes(small_vim)
