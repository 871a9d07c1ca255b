"""The whole road for models that are not ours: the ways to write VMamba's mixer, and transformers of timm."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.public_models import slow_but
from helpers.strategies import normal
from helpers.whole_road import travel
from torch import nn

from ptq4vm import Learning, QuantConfig, prepare
from ptq4vm.metadata import metadata_of

# --- the ways to write VMamba's mixer ---


class Linear2d(nn.Linear):
    """A linear of (B, D, H, W) as a 1×1 convolution with a weight (N, D)."""

    def forward(self, x):
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    """Four directions over (B, D, H, W), with a cumulative sum in the place of the scan."""

    def __init__(self, dim: int, written: str) -> None:
        super().__init__()
        self.written, self.inner, self.rank, self.states = written, 2 * dim, 2, 3
        linear = Linear2d if written == "channel first" else nn.Linear
        self.in_proj = linear(dim, self.inner, bias=False)
        self.conv2d = nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=self.inner)
        self.x_proj_weight = nn.Parameter(torch.randn(4, self.rank + 2 * self.states, self.inner) / 4)
        self.dt_projs_weight = nn.Parameter(torch.randn(4, self.inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.randn(4, self.inner))
        self.out_proj = linear(self.inner, dim, bias=False)

    def forward(self, x):
        first = self.written == "channel first"
        x = self.in_proj(x) if first else self.in_proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.silu(self.conv2d(x))
        B, D, H, W = x.shape
        across = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
        xs = torch.cat([across, across.flip(-1)], 1)  # (B, 4, D, L)
        step, b, c = self._project(xs).split([self.rank, self.states, self.states], dim=2)
        ys = (xs * F.softplus(self._step(step))).cumsum(-1) / (H * W) + (b * c).mean(2, keepdim=True)
        ys = ys[:, :2] + ys[:, 2:].flip(-1)
        y = ys[:, 0].view(B, D, H, W) + ys[:, 1].view(B, D, W, H).transpose(2, 3)
        return self.out_proj(y) if first else self.out_proj(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _project(self, xs):
        if self.written == "einsum":
            return torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
        merged = xs.view(xs.shape[0], -1, xs.shape[-1])
        return F.conv1d(merged, self.x_proj_weight.view(-1, self.inner, 1), groups=4).unflatten(1, (4, -1))

    def _step(self, step):
        if self.written == "einsum":
            product = torch.einsum("b k r l, k d r -> b k d l", step, self.dt_projs_weight)
            return product + self.dt_projs_bias.view(1, 4, -1, 1)
        merged, weight = step.contiguous().view(step.shape[0], -1, step.shape[-1]), self.dt_projs_weight
        bias = self.dt_projs_bias.view(-1)
        return F.conv1d(merged, weight.view(-1, self.rank, 1), bias, groups=4).view(-1, 4, self.inner, step.shape[-1])


class MixerBlock(nn.Module):
    def __init__(self, dim: int, written: str) -> None:
        super().__init__()
        self.norm, self.op, self.norm2 = LayerNorm2d(dim), Mixer(dim, written), LayerNorm2d(dim)
        self.fc1, self.fc2 = nn.Conv2d(dim, 2 * dim, 1), Linear2d(2 * dim, dim)

    def forward(self, x):
        x = x + self.op(self.norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Stage(nn.Module):
    def __init__(self, dim: int, written: str) -> None:
        super().__init__()
        self.blocks = nn.Sequential(MixerBlock(dim, written))
        self.downsample = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1), nn.GELU(), nn.Conv2d(2 * dim, 2 * dim, 1))

    def forward(self, x):
        return self.downsample(self.blocks(x))


class Hierarchy(nn.Module):
    """Stages of 6×6 and 3×3 tokens."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.ModuleList([Stage(8, written), Stage(16, written)])
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.head(x.mean((2, 3)))


W4A4 = QuantConfig.w4a4(learning=Learning(epochs=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "config"),
    [
        ("einsum", QuantConfig()),
        ("grouped convolution", QuantConfig(smoothing=None)),
        ("channel first", W4A4),
    ],
    ids=["einsum", "grouped convolution", "channel first"],
)
def test_all_ways_to_write_a_hierarchical_mamba(written, config, tmp_path):
    torch.manual_seed(0)
    model = Hierarchy(written)
    other = Hierarchy(written)  # with other weights
    linears = travel(model, normal(3, 3, 12, 12), config, tmp_path, model_for_load=other)
    mixer = [
        "in_proj",
        *(f"x_proj_weight.{k}" for k in range(4)),
        *(f"dt_projs_weight.{k}" for k in range(4)),
        "out_proj",
    ]
    names = [*(f"op.{name}" for name in mixer), "fc1", "fc2"]
    blocks = ["layers.0.blocks.0", "layers.1.blocks.0"]
    assert [linear.name for linear in linears] == [f"{block}.{name}" for block in blocks for name in names]
    assert [linear.tokens for linear in linears] == [36] * 12 + [9] * 12


class Recurrent(nn.Module):
    """Calls its weights twice, one of them by views of a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.stack = nn.Linear(6, 6), nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x):
        x = x + self.up(self.up(x).relu())
        return x + F.linear(F.linear(x, self.stack[1]).relu(), self.stack[1])


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(smoothing=None), W4A4], ids=["smooth", "plain", "w4a4"])
def test_each_call_of_a_weight_has_its_own_scales(config, tmp_path):
    torch.manual_seed(0)
    model = Recurrent()
    linears = travel(model, normal(3, 5, 6), config, tmp_path, model_for_load=Recurrent())
    assert [linear.name for linear in linears] == ["up", "up@1", "stack.1", "stack.1@1"]


# --- transformers ---


SMALL = {
    "deit": ("deit_tiny_patch16_224", {"depth": 2, "img_size": 64}, 64, [17] * 8),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 2), "num_heads": (2, 4), "embed_dim": 16, "img_size": 56},
        56,
        [*[196] * 4, *[49] * 9],  # the windows of an image are its tokens, and the reduction between the stages counts
    ),
}


@pytest.mark.parametrize("name", slow_but(("deit",), SMALL))
def test_transformers_take_the_same_road(name, tmp_path):
    architecture, options, size, tokens = SMALL[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=7, **options)
    linears = travel(model, normal(3, 3, size, size), QuantConfig(), tmp_path, model_for_load=model)
    assert [linear.tokens for linear in linears] == tokens


def test_between_the_stages_the_reductions_are_quantized():
    architecture, options, size, _ = SMALL["swin"]
    model = timm.create_model(architecture, **options)
    names = [linear.name for linear in metadata_of(prepare(model, (normal(2, 3, size, size),))).linears]
    outside = [name for name in names if ".blocks." not in name]
    assert outside and all(name.endswith(".downsample.reduction") for name in outside)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "count"), [("deit_tiny_patch16_224", 48), ("swin_tiny_patch4_window7_224", 51)], ids=str
)
def test_full_transformers_take_the_same_road(architecture, count, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(architecture)
    assert len(travel(model, normal(3, 3, 224, 224), QuantConfig(), tmp_path, model_for_load=None)) == count
