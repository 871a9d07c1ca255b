"""VMamba and LocalVMamba: cross-scan, quirks of the official code, feature maps on any map."""

import pytest
import torch
import torch.nn.functional as F
from golden.fill import make_input
from helpers.public_models import create, facts, filled, order

from ptq4vm.models import local_vmamba
from ptq4vm.models.checkpoints import load_checkpoint
from ptq4vm.models.hierarchical import released_weights
from ptq4vm.models.local_vmamba import LocalSS2D, PatchMerging
from ptq4vm.models.scan_order import Direction
from ptq4vm.models.vmamba import CROSS_SCAN
from ptq4vm.ops import scans


def test_the_cross_scan_is_rows_columns_and_their_reverses():
    assert [Direction.parse(name) for name in ("h", "v", "h_flip", "v_flip")] == list(CROSS_SCAN)


@pytest.mark.parametrize("name", ["local_vmamba_tiny", "local_vmamba_small"])
def test_directions_are_the_published_ones(name):
    with torch.device("meta"):
        model = create(name)
    have = [block.op.directions for stage in model.layers for block in stage.blocks]
    want = [tuple(map(Direction.parse, row)) for row in facts(name)["directions"]]
    assert have == want == [tuple(map(Direction.parse, row)) for row in facts(name, features_only=True)["directions"]]


@torch.no_grad()
def test_a_transposed_image_with_transposed_weights_gives_transposed_maps():
    """Only rows and columns change places, also on maps that are not square."""
    model = filled(create("vmamba_nano_32", features_only=True))
    other = create("vmamba_nano_32", features_only=True).eval()
    state = {}
    for name, value in model.state_dict().items():
        if value.dim() == 4:
            value = value.transpose(2, 3)
        elif name.endswith(("x_proj_weight", "dt_projs_weight", "dt_projs_bias")):
            value = value[[1, 0, 3, 2]]
        elif name.endswith(("A_logs", "Ds")):
            value = value.unflatten(0, (4, -1))[[1, 0, 3, 2]].flatten(0, 1)
        state[name] = value
    other.load_state_dict(state)
    x = torch.from_numpy(make_input(2, 40, 56))
    for one, two in zip(model(x), other(x.transpose(2, 3)), strict=True):
        assert one.shape[2:] == two.shape[:1:-1] and one.shape[2] != one.shape[3]
        assert torch.allclose(one, two.transpose(2, 3), atol=1e-4 * one.std())


@pytest.mark.parametrize("size", [(5, 7), (6, 6)])
@torch.no_grad()
def test_local_blocks_follow_the_official_code_word_by_word(size):
    """Channels first, all sequences padded to the longest, columns undone as if the map were square."""
    height, width = size
    names = ("v", "w2_flip", "h_flip", "v_flip")
    op = filled(LocalSS2D(16, 32, 4, names))
    x = torch.randn(2, height, width, 16)
    xz = (x @ op.in_proj.weight.T).permute(0, 3, 1, 2)
    u = F.silu(F.conv2d(xz[:, :32], op.conv2d.weight, op.conv2d.bias, padding=1, groups=32)).flatten(2)
    z = F.silu(xz[:, 32:])
    orders = [order(name, height, width) for name in names]
    longest, y = max(map(len, orders)), 0
    for k, tokens in enumerate(orders):
        sequence = torch.zeros(2, 32, longest)
        for t, token in enumerate(tokens):
            if token is not None:
                sequence[:, :, t] = u[:, :, token]
        projected = torch.einsum("bdl,cd->bcl", sequence, op.x_proj_weight[k])
        delta = torch.einsum("brl,dr->bdl", projected[:, :1], op.dt_projs_weight[k])
        A, D = -op.A_logs[32 * k : 32 * (k + 1)].exp(), op.Ds[32 * k : 32 * (k + 1)]
        inputs = (value.transpose(1, 2) for value in (sequence, delta, projected[:, 1:5], projected[:, 5:]))
        one, two, three, four = inputs
        scanned = scans.selective_scan(one, two, A, three, four, D, None, op.dt_projs_bias[k], True)
        scanned = scanned.transpose(1, 2)[:, :, : len(tokens)]
        if names[k].startswith("v"):
            scanned = scanned.flip(2) if names[k] == "v_flip" else scanned
            back = scanned.unflatten(2, (height, width)).transpose(2, 3).flatten(2)
        else:
            back = torch.zeros(2, 32, height * width)
            for t, token in enumerate(tokens):
                if token is not None:
                    back[:, :, token] = scanned[:, :, t]
        y = y + op.multi_scan.attn(back.transpose(1, 2))
    normed = F.layer_norm(y, (32,), op.out_norm.weight, op.out_norm.bias).unflatten(1, (height, width))
    want = (normed * z.permute(0, 2, 3, 1)) @ op.out_proj.weight.T
    assert torch.allclose(op(x), want, atol=1e-5)


def test_merged_patches_are_left_column_first_and_padded():
    merge = PatchMerging(1)
    merge.norm = torch.nn.Identity()
    merge.reduction = torch.nn.Identity()
    x = torch.arange(1.0, 16).reshape(1, 3, 5, 1)
    assert merge(x)[0].tolist() == [
        [[1, 6, 2, 7], [3, 8, 4, 9], [5, 10, 0, 0]],
        [[11, 0, 12, 0], [13, 0, 14, 0], [15, 0, 0, 0]],
    ]


@pytest.mark.parametrize("name", ["vmamba_nano_32", "local_vmamba_nano_32"])
@torch.no_grad()
def test_feature_maps_are_the_stages_outputs_normalized(name):
    model, backbone = filled(create(name)), filled(create(name, features_only=True, out_indices=(0, 1, 2)))
    x, taps = torch.from_numpy(make_input(1, 32, 32)), []
    for stage in model.layers:
        stage.register_forward_hook(lambda module, inputs, output: taps.append(output))
    model(x)
    maps = backbone(x)
    for i, (tap, have) in enumerate(zip(taps, maps, strict=True)):
        norm = backbone.get_submodule(f"outnorm{i}")
        want = F.layer_norm(tap, tap.shape[-1:], norm.weight, norm.bias, 1e-5)
        assert torch.allclose(have, want.permute(0, 3, 1, 2), atol=1e-5)
    assert backbone.feature_info.channels() == [24, 48, 96] and backbone.feature_info.reduction() == [4, 8, 16]


def test_directions_and_depths_must_agree():
    with pytest.raises(ValueError, match=r"directions has the scans of 15 blocks, depths=\(1, 1\) has 2"):
        create("local_vmamba_tiny", depths=(1, 1))
    assert len(local_vmamba.TINY) == 15 and len(local_vmamba.SMALL) == 33


def test_weights_of_old_releases_load_under_todays_names(tmp_path):
    """Returns weights under old names, with linears as 1×1 convolutions."""
    model = filled(create("vmamba_nano_32"))
    old = {}
    for name, value in model.state_dict().items():
        if name.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            value = value[..., None, None]
        name = name.replace(".norm.", ".ln_1.").replace(".op.", ".self_attention.")
        name = name.replace("classifier.ln_1.", "norm.").replace("classifier.head.", "head.")
        old[name.replace("patch_embed.0.", "patch_embed.proj.").replace("patch_embed.2.", "patch_embed.norm.")] = value
    assert {"norm.weight", "head.bias", "patch_embed.proj.weight"} < set(old)
    torch.save({"model": old}, tmp_path / "vssm.pth")
    other = create("vmamba_nano_32")
    load_checkpoint(other, tmp_path / "vssm.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert released_weights(model.state_dict()).keys() == model.state_dict().keys()
