"""Patterns that fuse, and patterns that are left and named."""

import pytest
import timm
import torch
from helpers.fusing import copied, counted, fuse_lowered
from torch import nn

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from ptq4vm import QuantConfig, convert, ops, quantize
from ptq4vm.passes.lower.fuse import fusions


class Mlp(nn.Module):
    def __init__(self, approximate):
        super().__init__()
        self.up, self.gelu, self.down = nn.Linear(16, 32), nn.GELU(approximate), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.gelu(self.up(x)))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_of_rotated_gelus_the_exact_one_alone_is_fused(approximate):
    torch.manual_seed(0)
    config = QuantConfig(rotation=True, range_search=False)
    plain = quantize(Mlp(approximate), [torch.randn(4, 8, 16)], config, progress=False)
    gm, x = fuse_lowered(copied(plain)), torch.randn(2, 8, 16)
    exact = approximate == "none"
    assert counted(gm) == (
        {"quantize": 1}
        | (dict(linear_gelu_quantize=1, linear_packed=1) if exact else dict(linear_packed=2, rotate_quantize=1))
    )
    assert (gm(x) - plain(x)).abs().max() <= 1e-2 * (plain(x) - x).abs().max()


def test_a_rotated_gelu_of_a_float_linear_is_fused_without_it():
    torch.manual_seed(0)
    config = QuantConfig(rotation=True, range_search=False, exclude=("up",))
    plain = quantize(Mlp("none"), [torch.randn(4, 8, 16)], config, progress=False)
    gm, x = fuse_lowered(copied(plain)), torch.randn(2, 8, 16)
    assert counted(gm) == dict(linear_packed=1, rotate_quantize=1)
    (turned,) = gm.graph.find_nodes(op="call_function", target=ops.rotate_quantize.default)
    assert turned.args[1]  # GELU on the way
    assert (gm(x) - plain(x)).abs().max() <= 1e-2 * (plain(x) - x).abs().max()


class TwiceNormed(nn.Module):
    """One norm before two linears."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.second(self.norm(x + self.first(self.norm(x)).sigmoid()))


def test_a_norm_that_is_called_twice_is_fused_twice():
    torch.manual_seed(0)
    plain = quantize(TwiceNormed(), [torch.randn(4, 8, 16)], QuantConfig(range_search=False), progress=False)
    gm, x = fuse_lowered(copied(plain)), torch.randn(2, 8, 16)
    assert counted(gm) == dict(norm_quantize=2, linear_packed=2)
    torch.testing.assert_close(gm(x), plain(x))


class Listed(nn.Module):
    """Its linears' results are read out of a list, and given back beside what a norm reads too."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        y = self.first(x)
        z = self.second(self.norm(y))
        return y, torch.cat([z, x])


def test_what_a_list_or_the_caller_reads_is_float32():
    torch.manual_seed(0)
    plain = quantize(Listed(), [torch.randn(4, 8, 16)], QuantConfig(range_search=False), progress=False)
    half, x = fuse_lowered(copied(plain), torch.bfloat16), torch.randn(2, 8, 16)
    for ours, theirs in zip(half(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("exclude", "reason"),
    [("*dt_proj", "its steps do not come from an integer linear"), ("*x_proj*", "its projection is not")],
)
def test_scans_with_float_projections_are_left_and_named(roads, exclude, reason):
    plain = convert(roads.calibrated(QuantConfig(exclude=(exclude,))))
    gm = fuse_lowered(copied(plain))
    found = [fusion.skip_reason for fusion in fusions(gm) if fusion.skip_reason and "scan" in fusion.pattern]
    assert found and all(text.startswith(reason) for text in found)
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(gm(images), plain(images), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_inverse_that_is_none_is_left_and_named():
    """LocalVMamba's columns on maps that are not square, as published, come back in another order."""
    torch.manual_seed(0)
    directions = [("v", "h", "w2", "v_flip")] * 3
    options = {"depths": (1, 1, 1), "directions": directions}
    model = timm.create_model("local_vmamba_nano_32", **options).eval()
    images = torch.randn(2, 3, 32, 48)
    plain = quantize(model, [images], progress=False)
    gm = fuse_lowered(copied(plain))
    left = [fusion.skip_reason for fusion in fusions(gm) if fusion.skip_reason and "scan" in fusion.pattern]
    assert "its result is put back in another order than the natural one" in left
    torch.testing.assert_close(gm(images), plain(images), rtol=1e-3, atol=1e-3)
