import re

import pytest
import timm
import torch
from helpers.public_models import BACKBONES, FILES, MICRO, NANO, create, facts, slow_but
from helpers.weights import read_checkpoint
from torch import Tensor

from ptq4vm.models.hierarchical import RENAMED
from ptq4vm.models.identify import identify, match, registered

NAMES = [*FILES, *NANO, *MICRO]
FIRST = ("vim_tiny_patch16_224", "local_vim_small", "vmamba_tiny_s1l8", "local_vmamba_nano_32")
"""One model of each family, with one of the twins."""
TWINS = {"local_vim_small", "local_vim_small_searched"}
"""Models that differ only in the directions of their scans."""


def twins(name: str) -> set[str]:
    return TWINS if name in TWINS else {name}


def weights(name: str, **options) -> dict[str, Tensor]:
    """Returns a model's tensors, without values."""
    with torch.device("meta"):
        return create(name, **options).state_dict()


def published(name: str, features_only: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of the public checkpoint, without values."""
    shapes = facts(name, features_only)["state_dict"]
    return {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items()}


def fitting(state: dict[str, Tensor]) -> set[str]:
    return {str(found) for found in identify(state) if found.fits}


def family(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def test_all_our_models_are_known_by_family():
    assert dict(registered()) == {name: family(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_fits_itself_and_its_twins_alone(name):
    assert fitting(weights(name)) == twins(name)
    best = identify(weights(name))[0]
    assert best.name in twins(name) and best.family == family(name) and best.agreement == 1
    assert not best.arguments and not best.notes and not best.lines()


@pytest.mark.parametrize("name", FILES)
def test_the_public_checkpoint_fits_its_model(name):
    assert fitting(published(name)) == twins(name)


@pytest.mark.parametrize("name", [*BACKBONES, "vmamba_nano_32", "local_vmamba_nano_32"])
def test_a_backbone_fits_itself_alone(name):
    if name in BACKBONES:
        assert fitting(published(name, features_only=True)) == {f"{name} with features_only=True"}
    assert fitting(weights(name, features_only=True)) == {f"{name} with features_only=True"}


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmamba_base_s2l15"])
def test_the_oldest_names_and_shapes_are_known_too(name):
    old = {}
    for now, tensor in weights(name).items():
        for before, after in RENAMED.items():
            now = before + now.removeprefix(after) if now.startswith(after) else now
        old[now.replace(".op.", ".self_attention.")] = tensor.reshape(*tensor.shape, 1, 1) if "fc1.w" in now else tensor
    assert old.keys() != weights(name).keys() and fitting(old) == {name}


@pytest.mark.parametrize("name", slow_but(FIRST, NAMES))
def test_what_is_missing_and_what_is_beyond_is_named(name):
    state = weights(name)
    gone = list(state)[len(state) // 2]
    state["extra.weight"] = torch.empty(1)
    shape = tuple(state.pop(gone).shape)
    best = identify(state)[0]
    assert best.name in twins(name) and not best.fits and 0.9 < best.agreement < 1
    assert best.missing == (gone,) and best.unexpected == ("extra.weight",) and not best.misshapen
    state[gone] = torch.empty(1, 2, 3, 4, 5)
    assert identify(state)[0].misshapen == {gone: ((1, 2, 3, 4, 5), shape)}
    assert match(name, state).misshapen == identify(state)[0].misshapen


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vim_tiny_patch16_224", {"num_classes": 100}),
        ("vim_tiny_patch16_224", {"in_chans": 4}),
        *((name, {"num_classes": 7, "in_chans": 1}) for name in FIRST),
        *(
            pytest.param(name, {"num_classes": 7, "in_chans": 1}, marks=pytest.mark.slow)
            for name in NAMES
            if name not in FIRST
        ),
    ],
)
def test_another_number_of_classes_or_channels_is_told(name, options):
    best = identify(weights(name, **options))[0]
    assert best.name in twins(name) and best.fits and best.arguments == best.options == options
    assert len(best.notes) == len(options) and all(
        f"{key}={value}" in str(best.notes) for key, value in options.items()
    )


@pytest.mark.parametrize(
    "name",
    slow_but(("local_vim_tiny",), [n for n in NAMES if family(n) in ("vim", "local_vim")]),
)
def test_another_image_size_is_told(name):
    size = 3 * timm.get_pretrained_cfg(name).input_size[-1]
    best = identify(weights(name, img_size=size))[0]
    assert best.name in twins(name) and best.fits and best.arguments == {"img_size": size}
    assert f"img_size={size}" in best.notes[0] and f"img_size={size}" in str(best)


def test_overlapping_patches_are_not_taken_for_larger_images():
    state = weights("vim_tiny_patch16_224") | {"pos_embed": torch.empty(1, 27**2 + 1, 192)}
    best = identify(state)[0]
    assert list(best.misshapen) == ["pos_embed"] and not best.arguments and "overlap" in best.notes[0]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_classifier_for_a_backbone_is_told(name):
    found = {str(found): found for found in identify(weights(name))}[f"{name} with features_only=True"]
    assert found.only_ends and not found.fits and "strict=False" in found.notes[0]
    assert all(name.startswith("outnorm") for name in found.missing) and len(found.missing) == 8


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "local_vim_tiny", "vmamba_tiny_s1l8", "local_vmamba_tiny"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_model_of_unknown_depth_is_the_closest_of_its_family(name, blocks):
    deeper = re.compile(r"layers\.\d+\.blocks\.(\d+)|layers\.(\d+)\.mixer")
    depth = {tensor: int(found[1] or found[2]) for tensor in weights(name) if (found := deeper.match(tensor))}
    state = {tensor: value for tensor, value in weights(name).items() if depth.get(tensor, 0) < blocks}
    best = identify(state)[0]
    assert best.family == family(name) and not best.unexpected and not best.misshapen
    assert set(best.missing) >= {tensor for tensor, place in depth.items() if place == 2}


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vmamba_tiny_s1l8"])
def test_a_model_of_unknown_width_is_of_its_family(name):
    best = identify(weights(name, embed_dim=80))[0]
    assert best.family == family(name) and not best.fits and len(best.misshapen) > 50


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet18", "mambaout_tiny"]
)
def test_a_model_of_another_family_is_none_of_ours(name):
    assert identify(weights(name)) == ()


@pytest.mark.parametrize("state", [{}, {"a": torch.ones(1)}, {"head.weight": torch.ones(2, 2)}])
def test_next_to_nothing_is_none_of_ours(state):
    assert identify(state) == ()


def test_looking_draws_no_random_numbers():
    before = torch.get_rng_state()
    identify(weights("vim_tiny_patch16_224", num_classes=11))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["local_vim_small", "vmamba_tiny_s1l8"])
@pytest.mark.parametrize("container", ["model", "state_dict", "model_ema", None])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_what_wraps_the_weights_does_not_matter(tmp_path, name, container, prefix):
    state = {prefix + tensor: torch.zeros(1).expand(value.shape) for tensor, value in weights(name).items()}
    state |= {"neck.weight": torch.ones(1)} if prefix == "backbone." else {}
    torch.save({container: state, "epoch": 1} if container else state, tmp_path / "file.pth")
    assert fitting(read_checkpoint(tmp_path / "file.pth")) == twins(name)
