"""MambaVision: windows, the official code's outputs, and the whole road of a small model in many windows."""

import numpy as np
import pytest
import torch
from golden.fill import make_input
from helpers.lowering import check
from helpers.public_models import GOLDEN, MAMBA_VISION_NANO, create, facts, filled
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ptq4vm
from ptq4vm import QuantConfig
from ptq4vm.metadata import metadata_of
from ptq4vm.models.mamba_vision import MambaVision
from ptq4vm.models.mamba_vision_blocks import Attention, MambaVisionMixer, from_windows, to_windows
from ptq4vm.models.registry import pretrained_cfg
from ptq4vm.passes.lower.fuse import fusions

CONFIG = QuantConfig(range_search=False, learning=None)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_windows_are_cut_and_put_together(height, width, side):
    x = torch.arange(2.0 * 3 * height * width).view(2, 3, height, width) + 1
    windows = to_windows(x, side)
    columns = -(-width // side)
    assert windows.shape == (2, -(-height // side) * columns, side**2, 3)
    assert torch.equal(from_windows(windows, side, height, width), x)
    i, j = height - 1, width - 1
    token = windows[:, i // side * columns + j // side, i % side * side + j % side]
    assert torch.equal(token, x[:, :, i, j]) and windows.count_nonzero() == x.numel()


@pytest.mark.parametrize("size", ["64x64", "100x76", "32x132"])
def test_logits_are_those_of_the_official_code_where_windows_need_padding(size):
    with np.load(GOLDEN / "mamba_vision_nano.npz") as file:
        official = torch.from_numpy(file[size])
    model = filled(MambaVision(**MAMBA_VISION_NANO))
    with torch.inference_mode():
        logits = model(torch.from_numpy(make_input(2, *map(int, size.split("x")))))
    assert (logits - official).abs().max() <= 1e-5 * official.std()


@pytest.mark.parametrize("name", ["mamba_vision_T", "mamba_vision_T2", "mamba_vision_S", "mamba_vision_B"])
def test_the_smaller_half_of_the_blocks_attends(name):
    with torch.device("meta"):
        model = create(name)
    kinds = [[type(block.mixer) for block in level.blocks] for level in model.levels[2:]]
    for have in kinds:
        mixers = (len(have) + 1) // 2
        assert have == [MambaVisionMixer] * mixers + [Attention] * (len(have) - mixers)
    official = {path for path, *_ in facts(name)["linears"] if path.endswith("qkv")}
    assert official == {path for path, _ in model.named_modules() if path.endswith("qkv")}


@pytest.mark.parametrize(("name", "crop"), [("T", 1.0), ("T2", 0.98), ("S", 0.93), ("B", 1.0)])
def test_preprocessing_is_that_of_the_official_code(name, crop):
    cfg = pretrained_cfg(f"mamba_vision_{name}")
    assert (cfg.crop_pct, cfg.interpolation, cfg.input_size) == (crop, "bicubic", (3, 224, 224))


def test_a_window_sees_itself_alone():
    block = filled(MambaVision(**MAMBA_VISION_NANO)).levels[2].blocks
    x = torch.randn(2, 3, 16, 64)
    for part in block:
        changed = part(torch.cat((x[:, :1], x[:, 1:] + 1), 1))
        assert torch.equal(changed[:, 0], part(x)[:, 0]) and not torch.equal(changed[:, 1], part(x)[:, 1])


@pytest.mark.slow
def test_the_whole_road_in_several_windows(tmp_path):
    """Every product of a mixer, of attention and of an MLP is quantized; norms are fused, and scans of one window."""
    torch.manual_seed(0)
    model = filled(MambaVision(**MAMBA_VISION_NANO))
    images = torch.from_numpy(make_input(3, 96, 72))
    prepared = ptq4vm.prepare(model, (images[:2],), CONFIG)
    wanted = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "head"}
    assert {linear.name for linear in metadata_of(prepared).linears} == wanted
    torch.testing.assert_close(prepared(images), model(images), rtol=1e-4, atol=1e-5)
    quantized = ptq4vm.convert(ptq4vm.calibrate(prepared, [images[:2]], progress=False))
    assert check(prepared, images) == len(wanted)
    blocks = [set(block["linears"]) for block in metadata_of(quantized).blocks]
    assert [len(block) for block in blocks] == [6, 6, 4, 6, 4]
    loaded = ptq4vm.load(ptq4vm.save(quantized, tmp_path / "model"))
    for count in (1, 3):
        assert torch.equal(loaded(images[:count]), quantized(images[:count]))
    fused = ptq4vm.fuse(quantized)
    torch.testing.assert_close(fused(images), quantized(images), rtol=1e-4, atol=1e-5)
    scans = [fusion.skip_reason for fusion in fusions(fused) if "scan" in fusion.pattern]
    # a level of one window; in the other the tokens of four windows have scales of their own, and scans see one each
    assert scans.count(None) == 1 and len(scans) == 3


def test_every_parameter_learns():
    model = filled(MambaVision(**MAMBA_VISION_NANO)).train()
    model(torch.from_numpy(make_input(2, 64, 64))).square().sum().backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]


def test_timms_manners():
    model = create("mamba_vision_T", depths=(1, 1, 1, 1), num_classes=7, drop_path_rate=0.1).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        features = model.forward_features(x)
        assert torch.equal(model(x), model.forward_head(features))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert model.no_weight_decay() <= set(dict(model.named_parameters())) and len(model.no_weight_decay()) == 4


def test_levels_without_heads_or_windows_are_refused():
    with pytest.raises(ValueError, match=r"depths=\(1, 1\), heads=\(1,\)"):
        MambaVision(depths=(1, 1), heads=(1,), windows=(8, 8))


def test_a_backbone_has_channels_first_norms():
    model = filled(create("mamba_vision_T", features_only=True, out_indices=(1, 3), depths=(1, 1, 1, 1)))
    with torch.inference_mode():
        maps = model(torch.from_numpy(make_input(2, 96, 132)))
    assert [tuple(x.shape) for x in maps] == [(2, 160, 12, 17), (2, 640, 3, 5)]
    for norm, x in zip((model.outnorm1, model.outnorm3), maps, strict=True):
        plain = (x.permute(0, 2, 3, 1) - norm.bias) / norm.weight
        assert plain.mean(-1).abs().max() < 1e-5 and (plain.std(-1, correction=0) - 1).abs().max() < 1e-3
