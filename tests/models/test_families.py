"""Laws of every public model: its parameters, logits and linears, and the whole way from prepare to load."""

import re

import numpy as np
import pytest
import timm
import torch
from golden.fill import make_input, selftest
from helpers.lowering import check
from helpers.public_models import (
    BACKBONES,
    FILES,
    GOLDEN,
    MICRO,
    NANO,
    SAMPLED,
    create,
    facts,
    filled,
    kept,
    shrunken,
    slow_but,
)

from ptq4vm import QuantConfig, calibrate, convert, load, prepare, save
from ptq4vm.metadata import metadata_of

WITH_GOLDEN = (
    "vim_tiny_patch16_224",
    "local_vim_tiny_middle_cls",
    "vmamba_tiny_s1l8",
    "local_vmamba_tiny",
    "mamba_vision_T",
)
LARGE = ("mamba_vision_T2", "mamba_vision_B", "mamba_vision_L", "mamba_vision_L2")
"""Models whose whole road takes minutes, and whose family has smaller ones with the same blocks."""
CONFIG = QuantConfig(range_search=False, learning=None)


def test_the_registry_has_every_public_model():
    modules = ("vim", "local_vim", "vmamba", "local_vmamba", "mamba_vision")
    assert {name for module in modules for name in timm.list_models(module=module)} == {*FILES, *NANO, *MICRO}


@pytest.mark.parametrize(
    ("name", "features_only"), [*((name, False) for name in FILES), *((name, True) for name in BACKBONES)]
)
def test_parameters_are_those_of_the_public_checkpoint(name, features_only):
    with torch.device("meta"):
        model = create(name, features_only=features_only)
    want = facts(name, features_only)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == want["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == want["parameters"]


@pytest.mark.parametrize("name", WITH_GOLDEN)
def test_logits_and_taps_are_those_of_the_official_code(name):
    """Compares mean, deviation, minimum and maximum of a module's output, whatever the order of its axes."""
    selftest()  # NumPy's random streams are those of the golden files
    with np.load(GOLDEN / f"{FILES[name]}.npz") as file:
        golden = dict(file)
    model, taps = filled(create(name)), {}

    def tap(path):
        def hook(module, inputs, output):
            count = taps[path, "calls"] = taps.get((path, "calls"), 0) + 1
            path_now = path if count == 1 else f"{path}#{count}"
            if isinstance(output, tuple):
                taps[f"{path_now}.hidden"], taps[f"{path_now}.residual"] = output
            else:
                taps[path_now] = output

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(tap(path))
    with torch.inference_mode():
        logits = model(torch.from_numpy(make_input())).double()

    official = torch.from_numpy(golden["logits64"])
    assert (logits - official).abs().max() <= 5e-5 * official.std() + 1e-6

    compared, wrong = 0, []
    for key, want in golden.items():
        value = taps.get(key.removeprefix("tap.").removesuffix(".stats"))
        if key.startswith("tap.") and isinstance(value, torch.Tensor):
            value, compared = value.double(), compared + 1
            have = np.array([value.mean(), value.std(correction=0), value.min(), value.max()])
            if not np.allclose(have, want, rtol=0, atol=1e-4 * want[1]):
                wrong.append((key, have, want))
    assert compared > 25 and not wrong


def listed(name: str, linears: list) -> set:
    """Returns the facts' linears under our names: `x_proj3` and `x_proj_weight[3]` are both `x_proj_weight.3`."""
    found = set()
    for path, inputs, outputs, _, tokens in linears:
        path = re.sub(r"_weight\[(\d)\]$", r"_weight.\1", path)
        if name.startswith("vmamba"):
            path = re.sub(r"\.x_proj(\d)$", r".x_proj_weight.\1", path)
            path = re.sub(r"\.dt_proj(\d)$", r".dt_projs_weight.\1", path)
        found.add((path, tokens, inputs, outputs))
    return found


def walk(model, images, tmp_path):
    """Quantizes, saves and loads a model, which must return the same bits; returns the prepared model."""
    prepared = calibrate(prepare(model, (images,), CONFIG), [images], progress=False)
    quantized = convert(prepared)
    with torch.inference_mode():
        before = quantized(images)
    save(quantized, tmp_path / "model")
    with torch.inference_mode():
        after = load(tmp_path / "model")(images)
    assert all(map(torch.equal, before, after))  # rows of logits, or feature maps
    return prepared


@pytest.mark.parametrize("name", slow_but(("vim_tiny_patch16_224",), FILES))
def test_the_whole_road_at_one_block_a_stage(name, tmp_path):
    """The public list of linears is quantized, and loading restores the saved model."""
    torch.manual_seed(0)
    prepared = walk(create(name, **shrunken(name)).eval(), torch.from_numpy(make_input()), tmp_path)
    linears = metadata_of(prepared).linears
    have = {(linear.name, linear.tokens, linear.in_features, linear.out_features) for linear in linears}
    assert have == {linear for linear in listed(name, facts(name)["linears"]) if kept(linear[0])}
    assert len(have) == len(linears)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if name not in LARGE])
def test_the_whole_road_at_full_size(name, tmp_path):
    torch.manual_seed(0)
    prepared = walk(create(name).eval(), torch.from_numpy(make_input()), tmp_path)
    linears = metadata_of(prepared).linears
    have = {(linear.name, linear.tokens, linear.in_features, linear.out_features) for linear in linears}
    assert have == listed(name, facts(name)["linears"])
    assert len(have) == len(linears) == len(facts(name)["linears"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vmamba_nano_32", "local_vmamba_nano_32"])
def test_a_backbone_walks_the_road_on_maps_that_are_not_square(name, tmp_path):
    torch.manual_seed(0)
    images = torch.from_numpy(make_input(2, 36, 56))
    model = create(name, features_only=True, out_indices=(0, 2)).eval()
    with torch.inference_mode():
        shapes = [tuple(value.shape) for value in model(images)]
    assert shapes == [(2, 24, 9, 14), (2, 96, 3, 4)]
    assert model.feature_info.channels() == [24, 96] and model.feature_info.reduction() == [4, 16]
    prepared = walk(model, images, tmp_path)
    assert check(prepared, images) == len(metadata_of(prepared).linears)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_at_full_size_walks_the_road(name, tmp_path):
    torch.manual_seed(0)
    prepared = walk(create(name, features_only=True).eval(), torch.from_numpy(make_input(2, 160, 224)), tmp_path)
    assert len(metadata_of(prepared).linears) == len(facts(name)["linears"])


@pytest.mark.parametrize("name", SAMPLED)
def test_every_code_and_accumulator_is_the_calibrated_one(name):
    """Integers of every linear equal the Q/DQ graph's, on drawn images."""
    torch.manual_seed(0)
    images = torch.randn(5, 3, 32, 32)
    prepared = calibrate(prepare(create(name).eval(), (images,), CONFIG), [images], progress=False)
    assert check(prepared, torch.randn(3, 3, 32, 32)) == len(metadata_of(prepared).linears)


@pytest.mark.parametrize("name", NANO)
def test_every_parameter_learns(name):
    model = filled(create(name)).train()
    model(torch.from_numpy(make_input(2, 32, 32))).square().sum().backward()
    idle = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle


@pytest.mark.parametrize("name", NANO)
def test_timms_manners(name):
    model = create(name, num_classes=7, drop_path_rate=0.1).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        features = model.forward_features(x)
        assert torch.equal(model(x), model.forward_head(features))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))
    assert create(name, in_chans=1)(x[:, :1]).shape == (2, 10)


def test_plain_models_have_no_feature_maps():
    with pytest.raises(ValueError, match="vim_nano_patch4_32 has one resolution"):
        create("vim_nano_patch4_32", features_only=True)


def test_feature_maps_that_do_not_exist_are_refused():
    assert create("vmamba_nano_32", features_only=True, out_indices=(-1,)).feature_info.channels() == [96]
    with pytest.raises(ValueError, match=r"out_indices=\(0, 3\): the model has 3 stages"):
        create("vmamba_nano_32", features_only=True, out_indices=(0, 3))
