import pytest
import torch
from helpers.strategies import normal

from ptq4vm import QuantConfig, convert, prepare
from ptq4vm.inspection.layers import floating, floating_rows, measure, original, quantized_rows, walk, watch
from ptq4vm.inspection.phenomena import observe
from ptq4vm.inspection.statistics import QUANTIZED
from ptq4vm.metadata import metadata_of
from ptq4vm.models import Vim

MINMAX8, MINMAX4 = QuantConfig.minmax(8), QuantConfig.minmax(4)
SMOOTH4 = QuantConfig.smoothquant(4)


@pytest.fixture(scope="module")
def quantized(roads):
    """Returns the quantized model of a config, made once."""
    made = {}

    def make(config):
        if config not in made:
            made[config] = convert(roads.calibrated(config))
        return made[config]

    return make


def test_walking_computes_what_calling_does(small_vim, images):
    graph = floating(small_vim, images[:2])
    (result,) = graph.graph.output_node().all_input_nodes
    ((node, (value,)),) = walk(graph, images, {result: (result,)})
    assert node is result and torch.equal(value, graph(images))


def test_a_value_lives_as_long_as_it_is_named(quantized, images):
    graph = quantized(MINMAX8)
    linears = graph.graph.find_nodes(op="call_function", target=torch.ops.ptq4vm.linear.default)
    watched = {node: (node.args[0].args[0], None, 3, node) for node in linears}
    seen = list(walk(graph, images[:1], watched))
    assert [node for node, _ in seen] == linears
    for _, (x, nothing, number, y) in seen:
        assert x.shape[:2] == y.shape[:2] and nothing is None and number == 3


@pytest.mark.parametrize("config", [MINMAX8, SMOOTH4], ids=["minmax", "smoothquant"])
def test_every_linear_has_a_row_and_the_worst_is_first(quantized, small_vim, images, config):
    graph = quantized(config)
    layers = measure(graph, images.split(5), against=original(graph, small_vim, images[:2]))
    names = [linear.name for linear in metadata_of(graph).linears]
    rows = quantized_rows(graph, layers)
    assert [layer.name for layer in layers] == names and sorted(row["name"] for row in rows) == sorted(names)
    found = [row["output_sqnr_db"] for row in rows]
    assert found == sorted(found)
    for row in rows:
        assert 0 < row["output_cosine"] <= 1 and 0 < row["input_cosine"] <= 1 and row["granularity"] == "per_tensor"
        assert (row["smooth_min"] is None) == (config.smoothing is None)


def test_without_the_original_the_inputs_decide(quantized, images):
    graph = quantized(MINMAX4)
    rows = quantized_rows(graph, measure(graph, [images]))
    found = [row["input_sqnr_db"] for row in rows]
    assert found == sorted(found) and not {"output_sqnr_db", "weight_sqnr_db"} & rows[0].keys()


def test_eight_bits_are_closer_than_four(quantized, small_vim, images):
    measured = []
    for config in (MINMAX8, MINMAX4):
        graph = quantized(config)
        measured.append(measure(graph, [images], against=original(graph, small_vim, images[:2])))
    for fine, coarse in zip(*measured, strict=True):
        assert fine.input.sqnr > coarse.input.sqnr and fine.output.sqnr > coarse.output.sqnr
        assert fine.weight.sqnr > coarse.weight.sqnr + 15


@pytest.mark.parametrize("smoothing", [None, 0.5])
def test_rotated_weights_are_compared_with_rotated_ones(quantized, small_vim, images, smoothing):
    """Rotation and smoothing cost nothing: the error of 8 bits remains."""
    graph = quantized(QuantConfig.minmax(8, rotation=True, smoothing=smoothing))
    rows = quantized_rows(graph, measure(graph, [images]))
    assert all((row["smooth_min"] is None) == (smoothing is None) for row in rows)
    for layer in measure(graph, [images], against=original(graph, small_vim, images[:2])):
        assert layer.weight.sqnr > 35


def test_batches_do_not_matter(quantized, small_vim, images):
    graph = quantized(SMOOTH4)
    against = original(graph, small_vim, images[:2])
    whole, parts = (measure(graph, images.split(size), against=against) for size in (12, 5))
    for one, other in zip(whole, parts, strict=True):
        expected = other.row()
        assert one.name == expected.pop("name")
        assert {key: one.row()[key] for key in expected} == pytest.approx(expected, rel=1e-3)


def test_minimum_and_maximum_clip_nothing_they_have_seen(roads, images):
    graph = convert(roads.calibrated(MINMAX8))
    first, *rest = measure(graph, images.split(5))
    assert first.clipped == 0 and first.values == images.shape[0] * 17 * 32
    assert all(layer.row()["clipped_percent"] < 1 for layer in rest)  # they see what quantized linears made
    for name, tensor in graph.named_buffers():
        if name.endswith("input_inv_scale"):
            tensor *= 2
    assert all(layer.clipped for layer in measure(graph, images.split(5)))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token", "per_token_dynamic"])
@pytest.mark.parametrize("smoothing", [None, 0.5])
def test_every_granularity_has_figures(quantized, images, granularity, smoothing):
    activations = {"bits": 4, "granularity": granularity}
    config = QuantConfig(activations=activations, smoothing=smoothing, range_search=False)
    for layer in measure(quantized(config), images.split(7), figures=True):
        activation, percent = layer.activation, layer.row()["clipped_percent"]
        assert 0 <= percent < 100 and (percent == 0 or granularity != "per_token_dynamic")
        assert activation.images == len(images) and ("|x / s|" in activation.surfaces()) == (smoothing is not None)
        before, after = activation.bands().values()
        assert list(activation.bands())[-1] == QUANTIZED and before.shape == after.shape
        assert (after.diff(dim=0) >= 0).all()


def test_a_floating_point_model_shows_what_calibration_would_see(small_vim, images):
    graph = floating(small_vim, images[:2])
    rows = floating_rows(graph, watch(graph, images.split(5)))
    figures = observe(prepare(small_vim, (images[:2],), MINMAX8), images.split(5))
    assert sorted(row["name"] for row in rows) == sorted(figures)
    for row in rows:
        exact = figures[row["name"]].to_dict()
        assert {key: row[key] for key in ("token_variance", "channel_outliers")} == pytest.approx(
            {key: exact[key] for key in ("token_variance", "channel_outliers")}
        )
    assert [row["peak"] for row in rows] == sorted((row["peak"] for row in rows), reverse=True)


def test_another_model_is_refused(quantized, images):
    other = Vim(img_size=16, patch_size=4, embed_dim=16, depth=2, state=4, num_classes=10)
    with pytest.raises(ValueError, match=r"the models differ: .* it has layers\.0\.mixer\.in_proj .* → 64"):
        original(quantized(MINMAX8), other, images[:2])


def test_values_that_are_not_finite_are_refused(quantized, small_vim, images):
    broken = images.clone()
    broken[0, 0, 0, 0] = torch.inf
    for call in (lambda: measure(quantized(MINMAX8), [broken]), lambda: watch(floating(small_vim, images), [broken])):
        with pytest.raises(ValueError, match=r"layers\.0\.mixer\.in_proj: its input has values that are not finite"):
            call()


def test_only_integers_are_measured(roads):
    graph = convert(roads.calibrated(MINMAX8), lower=False)
    with pytest.raises(ValueError, match="only lowered models are measured"):
        measure(graph, [normal(1, 3, 16, 16)])
