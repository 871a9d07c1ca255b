"""Additions of LocalVim to Vim: windows, rotations, the channel gate, a class token that keeps its place."""

import pytest
import torch
from golden.fill import make_input, rope_table
from helpers.public_models import create, facts, filled

from ptq4vm.models.isotropic import RotaryEmbedding
from ptq4vm.models.local_vim import FIXED, SEARCHED
from ptq4vm.models.scan_order import Direction


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("local_vim_tiny", SEARCHED),
        ("local_vim_tiny_middle_cls", SEARCHED),
        ("local_vim_small", FIXED),
        ("local_vim_small_searched", SEARCHED),
    ],
)
def test_directions_are_the_published_ones(name, table):
    want = facts(name)["directions"]
    assert [list(row) for row in table] == want
    with torch.device("meta"):
        model = create(name)
    have = [list(block.mixer.directions.values()) for block in model.layers]
    assert have == [[Direction.parse(direction) for direction in row] for row in want]


def test_an_option_chooses_the_directions_of_small():
    with torch.device("meta"):
        model = create("local_vim_small", directions=SEARCHED)
    assert len(model.layers) == 20
    assert list(model.layers[0].mixer.directions.values())[1] == Direction.parse("v_flip")


def test_every_direction_has_states_of_its_own():
    """The official constructor aliases the four; a checkpoint loaded into it is silently wrong."""
    mixer = filled(create("local_vim_tiny", directions=SEARCHED[:1])).layers[0].mixer
    states = [mixer.get_parameter(f"A_log_{k}") for k in range(4)]
    assert len({state.data_ptr() for state in states}) == 4
    assert not any(torch.equal(states[i], states[j]) for i in range(4) for j in range(i))


def test_the_rotary_table_is_the_published_buffer():
    rope = RotaryEmbedding(192, (14, 14))
    cos, sin = map(torch.from_numpy, rope_table(196, 192))
    assert torch.allclose(rope.freqs_cos, cos, atol=1e-6) and torch.allclose(rope.freqs_sin, sin, atol=1e-6)
    assert set(dict(rope.named_buffers())) == set(rope.state_dict())  # checkpoints have them


def test_rotations_are_those_of_complex_numbers():
    """A pair (a, b) becomes (a + ib) · exp(i · angle); rows turn the first half of the channels, columns the second."""
    rope, x = RotaryEmbedding(16, (3, 5)), torch.randn(2, 15, 16)
    rates = 10000.0 ** -(torch.arange(4) / 4)
    row, column = torch.arange(15) // 5, torch.arange(15) % 5
    angles = torch.cat((row[:, None] * rates, column[:, None] * rates), -1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    want = torch.view_as_real(pairs * torch.polar(torch.ones(15, 8), angles)).flatten(-2)
    assert torch.allclose(rope(x), want, atol=1e-5)
    assert torch.allclose(rope(x).norm(dim=-1), x.norm(dim=-1), atol=1e-4)


def test_the_residual_is_rotated_before_every_block():
    """If blocks add nothing, a token has turned once per block when it reaches the last norm."""
    model = create("local_vim_nano_patch4_32").eval()
    for block in model.layers:
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    x = torch.from_numpy(make_input(1, 32, 32))
    with torch.inference_mode():
        tokens = model.patch_embed(x) + model.pos_embed
        for _ in model.layers:
            tokens = model.rope(tokens)
        assert torch.allclose(model.forward_features(x), model.norm_f(tokens), atol=1e-5)


def test_without_a_class_token_the_mean_token_is_classified():
    model = filled(create("local_vim_nano_patch4_32"))
    x = torch.from_numpy(make_input(2, 32, 32))
    with torch.inference_mode():
        assert torch.allclose(model(x), model.head(model.forward_features(x).mean(1)), atol=1e-6)


def test_a_class_token_keeps_its_place_in_every_order():
    """The class token has the same index before, in and after the scan of a reordered map."""
    model = filled(create("local_vim_tiny_middle_cls", img_size=64, directions=SEARCHED[:1]))
    mixer, seen = model.layers[0].mixer, []
    mixer.branch = lambda xz, suffix: seen.append(xz) or xz[..., :384]
    mixer.attn = torch.nn.Identity()
    xz = torch.randn(1, 17, 768)
    for suffix, direction in mixer.directions.items():
        out = mixer._direction(xz, suffix)
        assert torch.equal(seen[-1][:, 8], xz[:, 8])
        patches = torch.cat((xz[:, :8], xz[:, 9:]), 1)
        assert torch.equal(
            torch.cat((seen[-1][:, :8], seen[-1][:, 9:]), 1)[:, :16], direction.scan(patches, 4, 4)[:, :16]
        )
        assert torch.equal(out, xz[..., :384])
