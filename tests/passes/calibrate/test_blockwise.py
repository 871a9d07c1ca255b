import dataclasses
import logging

import pytest
import torch
from helpers import small_models
from helpers.strategies import EVERYTHING, fitting, normal
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, prepare, save
from ptq4vm.inspection.phenomena import observe
from ptq4vm.metadata import metadata_of
from ptq4vm.ops.quantization import affine_qparams
from ptq4vm.passes.calibrate import block_quantizers, correct_and_round
from ptq4vm.passes.calibrate import blockwise as module
from ptq4vm.passes.quantized_nodes import quantized_linears
from ptq4vm.quantization_specs import Granularity, Learning, Loss
from ptq4vm.quantizers import Mode

LEARNED = QuantConfig.w4a4(learning=Learning(epochs=2, batch_size=5))
UNLEARNED = QuantConfig.w4a4(learning=None)


def linears_of(gm):
    return quantized_linears(gm)


def saved(gm, folder) -> list[bytes]:
    """The files of the saved model."""
    save(convert(gm), folder)
    return [(folder / name).read_bytes() for name in ("model.safetensors", "config.json")]


# --- what it finds ---


def test_minimum_to_maximum_is_that_of_every_token_over_all_images(roads, images):
    gm = roads.prepared(QuantConfig.minmax(8, activations={"granularity": Granularity.PER_TOKEN}))
    linear = linears_of(gm)[0]
    linear.input.mode = Mode.OBSERVE
    gm(images)
    (x,) = linear.input.observations
    calibrate(gm, images.split(5), progress=False)
    linear = linears_of(gm)[0]
    want = affine_qparams(x.amin((0, 2)), x.amax((0, 2)), 8)
    assert torch.equal(linear.input.scale, want[0]) and torch.equal(linear.input.zero_point, want[1])


@pytest.mark.parametrize("granularity", Granularity)
def test_every_linear_gets_its_qparams(roads, granularity):
    config = QuantConfig(**fitting(granularity) | {"range_search": False})
    for linear, fact in zip(
        linears_of(roads.calibrated(config)), metadata_of(roads.prepared(config)).linears, strict=True
    ):
        tokens = {"per_token_dynamic": None}.get(
            granularity, (17,) if Granularity(granularity).static_per_token else (1,)
        )
        assert (None if linear.input.scale is None else tuple(linear.input.scale.shape)) == tokens
        assert linear.weight.scale.shape == (fact.out_features,)
        assert linear.smooth is not None and linear.smooth.any()
        assert linear.input.mode is linear.weight.mode is Mode.QUANTIZE
        assert linear.input.observations == []


def test_the_batches_of_the_loader_do_not_matter(roads, images, tmp_path):
    one, other = roads.prepared(UNLEARNED), roads.prepared(UNLEARNED)
    calibrate(one, [images], progress=False)
    calibrate(other, images.split(1), progress=False)
    assert saved(one, tmp_path / "a") == saved(other, tmp_path / "b")


def test_more_images_than_run_at_once(roads, images, monkeypatch):
    gm, again = roads.prepared(UNLEARNED), roads.prepared(UNLEARNED)
    calibrate(gm, [images], progress=False)
    monkeypatch.setattr(block_quantizers, "FORWARD_BATCH", 5)
    calibrate(again, [images], progress=False)
    for a, b in zip(linears_of(gm), linears_of(again), strict=True):
        assert torch.allclose(a.input.scale, b.input.scale, rtol=1e-4)


@pytest.mark.parametrize("gptq", [pytest.param(False, marks=pytest.mark.slow), True])
def test_calibrating_again_forgets_what_was_found_before(roads, images, tmp_path, gptq):
    config = dataclasses.replace(LEARNED, gptq=gptq)
    once = calibrate(roads.prepared(config), [images], progress=False)
    again = calibrate(roads.prepared(config), [images[:3] * 10], progress=False)
    calibrate(again, [images], progress=False)
    assert saved(once, tmp_path / "a") == saved(again, tmp_path / "b")


def test_the_report_says_what_learning_did(roads):
    blocks = metadata_of(roads.calibrated(LEARNED)).blocks
    assert [block["block"] for block in blocks] == ["layers.0", "layers.1"]
    assert all(block["loss_after"] <= block["loss_before"] for block in blocks)
    names = [linear.name for linear in metadata_of(roads.calibrated(LEARNED)).linears]
    assert [name for block in blocks for name in block["linears"]] == names


def test_the_report_says_how_near_each_block_is(roads):
    """Every recipe, learned or not; the same input, so more bits are nearer."""
    few, many = (
        metadata_of(roads.calibrated(QuantConfig(weights={"bits": n}, activations={"bits": n}))).blocks for n in (4, 8)
    )
    assert all(0 < more["cosine_loss"] < less["cosine_loss"] / 10 for more, less in zip(many, few, strict=True))


def test_the_better_recipe_stays_closer_to_the_model(roads, small_vim, images):
    """The gain of learning is held block by block, in test_learn_scales."""
    want = small_vim(images)

    def error(config):
        return (convert(roads.calibrated(config))(images) - want).square().mean()

    assert error(UNLEARNED) < error(QuantConfig.minmax(4)) / 2


# --- mirror images ---


def test_mirror_images_are_calibrated_on_as_if_the_loader_gave_them(roads, images):
    config = dataclasses.replace(LEARNED, mirror=True)
    both = [image for x in images for image in (x, x.flip(-1))]
    one = calibrate(roads.prepared(config), [images], progress=False)
    other = calibrate(roads.prepared(LEARNED), [torch.stack(both)], progress=False)
    have, want = (convert(gm).state_dict() for gm in (one, other))
    assert have.keys() == want.keys() and all(torch.equal(have[name], want[name]) for name in want)


def test_what_is_no_image_has_no_mirror_image():
    with pytest.raises(ValueError, match=r"mirror=True is for images \(B, C, H, W\), but the input 'x' has the shape"):
        module.mirrored({"x": torch.zeros(2, 3, 4)})


# --- one seed, the same bytes ---


def test_one_seed_gives_the_same_bytes_and_another_others(roads, images, tmp_path):
    def run(seed: int, name: str) -> list[bytes]:
        config = QuantConfig.w4a4(learning=LEARNED.learning, seed=seed)
        torch.manual_seed(len(name))  # must not matter
        return saved(calibrate(roads.prepared(config), [images], progress=False), tmp_path / name)

    one = run(1, "one")
    assert run(1, "again") == one
    assert run(2, "other")[0] != one[0]


def test_every_block_has_an_order_of_images_of_its_own(monkeypatch, images):
    seeds = []
    monkeypatch.setattr(module, "learn_block", lambda *args: seeds.append(args[5]))
    config = dataclasses.replace(small_models.LEARNED, seed=40)
    calibrate(prepare(small_models.blocks(), (normal(2, 5, 8),), config), [normal(4, 5, 8)], progress=False)
    assert seeds == [41, 42]  # the stem, which does not learn, has 40


# --- an interrupted run ---


@pytest.fixture(params=[LEARNED, pytest.param(EVERYTHING, marks=pytest.mark.slow)], ids=["learned", "everything"])
def config(request):
    return request.param


@pytest.fixture
def uninterrupted(roads, images, tmp_path, config):
    gm = calibrate(roads.prepared(config), [images], progress=False)
    return saved(gm, tmp_path / "uninterrupted")


def interrupt(monkeypatch, gm, images, folder, block: int) -> None:
    """Ctrl-C while the given block learns."""
    learn, seen = module.learn_block, []

    def learn_block(part, *rest):
        seen.append(part.name)
        if len(seen) > block:
            raise KeyboardInterrupt
        return learn(part, *rest)

    monkeypatch.setattr(module, "learn_block", learn_block)
    with pytest.raises(KeyboardInterrupt):
        calibrate(gm, [images], resume_dir=folder, progress=False)
    monkeypatch.undo()


def test_a_block_learns_with_its_own_fisher_diagonal_and_is_compensated_as_the_halves_say(monkeypatch, roads, images):
    given, learned, ridges = [], {}, []
    monkeypatch.setattr(
        module, "fisher_diagonal", lambda blocks, *_: given.extend({"of": b.name} for b in blocks) or given
    )
    monkeypatch.setattr(module, "learn_block", lambda part, *rest: learned.update({part.name: rest[-1]["of"]}))
    monkeypatch.setattr(correct_and_round, "best_ridge", lambda *_: 7.0)
    compensated = correct_and_round.compensated_weight
    monkeypatch.setattr(
        correct_and_round, "compensated_weight", lambda *args: ridges.append(args[-1]) or compensated(*args)
    )
    config = QuantConfig.w4a4(best=True, learning=Learning(epochs=1, loss=Loss.FISHER))
    calibrate(roads.prepared(config), [images], progress=False)
    assert learned == {"layers.0": "layers.0", "layers.1": "layers.1"}
    assert ridges == [7.0] * 12


@pytest.mark.parametrize("block", [0, 1])
def test_an_interrupted_run_continues_and_ends_with_the_same_bytes(
    monkeypatch, roads, images, tmp_path, config, uninterrupted, block
):
    folder = tmp_path / "resume"
    interrupt(monkeypatch, roads.prepared(config), images, folder, block)
    done = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(done) == block

    learned = []
    learn = module.learn_block
    monkeypatch.setattr(module, "learn_block", lambda part, *rest: learned.append(part.name) or learn(part, *rest))
    gm = calibrate(roads.prepared(config), [images], resume_dir=folder, progress=False)
    assert learned == ["layers.0", "layers.1"][block:]
    assert saved(gm, tmp_path / "resumed") == uninterrupted


def test_the_model_that_was_interrupted_can_go_on_itself(monkeypatch, roads, images, tmp_path, config, uninterrupted):
    gm = roads.prepared(config)
    interrupt(monkeypatch, gm, images, tmp_path / "resume", 1)
    calibrate(gm, [images], resume_dir=tmp_path / "resume", progress=False)
    assert saved(gm, tmp_path / "resumed")[0] == uninterrupted[0]


def test_an_interrupted_model_is_not_calibrated(monkeypatch, roads, images, tmp_path):
    gm = roads.calibrated(LEARNED)
    interrupt(monkeypatch, gm, images, tmp_path / "resume", 1)
    with pytest.raises(RuntimeError, match="not calibrated"):
        convert(gm)


# --- bad data ---


class Poisoned(nn.Module):
    """A constant that is not finite, between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(3))

    def forward(self, x):
        x = self.layers[1](torch.log(self.layers[0](x).abs().detach() - 1e9))
        return self.layers[2](x)


def test_activations_that_are_not_finite_name_the_layer():
    x = normal(4, 5, 6)
    prepared = prepare(Poisoned(), (x,), UNLEARNED)
    message = r"layers\.1\.0: its input has values that are not finite for 4 of 4 calibration images; .*exclude"
    with pytest.raises(ValueError, match=message):
        calibrate(prepared, [x], progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layers.1.fc1", "layers.0.fc2"])
def test_weights_that_are_not_finite_name_the_layer(name, value):
    model = small_models.blocks()
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[1, 2] = value
    prepared = prepare(model, (normal(2, 5, 8),), UNLEARNED)
    with pytest.raises(ValueError, match=rf"^{name}: 1 of its 128 weights are not finite; check the checkpoint"):
        calibrate(prepared, [normal(4, 5, 8)], progress=False)


def test_outputs_that_are_not_finite_name_the_block():
    model = small_models.blocks(flow=lambda m, x: m.head(m.layers[1](m.layers[0](x)).mean(1)))
    model.layers[1].gain.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"^layers\.1: its output .* not finite for 4 of 4 calibration images"):
        calibrate(prepare(model, (normal(2, 5, 8),), UNLEARNED), [normal(4, 5, 8)], progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_name_the_batch(roads, images, value):
    bad = images.clone()
    bad[7, 0, 0, 0] = value
    with pytest.raises(ValueError, match="calibration batch 1: input 'x' has values that are not finite"):
        calibrate(roads.prepared(UNLEARNED), bad.split(5), progress=False)


@pytest.mark.parametrize("loader", [[], [torch.zeros(0, 3, 16, 16)], iter(())], ids=["list", "no images", "iterator"])
def test_an_empty_loader_is_an_error(roads, loader):
    with pytest.raises(ValueError, match="the calibration loader is empty; give it at least one image"):
        calibrate(roads.prepared(UNLEARNED), loader, progress=False)


# --- progress ---


def test_progress_shows_block_epoch_and_loss(roads, images, capsys):
    calibrate(roads.prepared(LEARNED), [images])
    error = capsys.readouterr().err
    assert "images: 12image" in error
    assert "4/4" in error and "block=layers.1" in error and "epoch=2" in error and "loss=" in error


def test_without_progress_nothing_is_printed(roads, images, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="ptq4vm"):
        calibrate(roads.prepared(LEARNED), [images], progress=False)
    assert capsys.readouterr() == ("", "")


class SharedInput(nn.Module):
    """Two linears that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.first(x) * self.second(x)


@pytest.mark.parametrize("smoothing", [None, 0.5])
def test_linears_that_share_their_input_are_both_seen(smoothing):
    x = normal(4, 5, 6)
    prepared = prepare(SharedInput(), (x,), QuantConfig(smoothing=smoothing, gptq=True))
    figures = observe(prepared, [x, x])
    assert figures["first"] == figures["second"]
    calibrate(prepared, [x], progress=False)
    assert all(linear.input.observations == [] and linear.weight.codes is not None for linear in linears_of(prepared))
