"""Gates before linears: spellings that one operator computes, and what is left to others."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import copied, counted, fuse_lowered
from torch import nn

from ptq4vm import Granularity, QuantConfig, ops, quantize
from ptq4vm.backend import dynamo
from ptq4vm.graph.insert import aten
from ptq4vm.passes.lower.fuse import fusions

STATIC = QuantConfig(range_search=False, learning=None)
D = 16


class Gated(nn.Module):
    """`spelling` of K branches (B, L, D), their gates (B, 1, D), and a gate z (B, L, D), before a linear."""

    def __init__(self, spelling, branches=3):
        super().__init__()
        self.spelling = spelling
        self.branches = nn.ModuleList(nn.Linear(D, D) for _ in range(branches))
        self.to_gate, self.to_z, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        return self.out(self.spelling(ys, [self.to_gate(y.mean(1, keepdim=True)).sigmoid() for y in ys], self.to_z(x)))


def products(ys, gates):
    return [y * gate for y, gate in zip(ys, gates, strict=True)]


SPELLINGS = {
    "sum of Python's": lambda ys, gates, z: sum(products(ys, gates)),
    "reduce": lambda ys, gates, z: functools.reduce(torch.add, products(ys, gates)),
    "from the end": lambda ys, gates, z: functools.reduce(lambda a, b: b + a, products(gates, ys)),
    "stack first": lambda ys, gates, z: torch.stack(products(ys, gates)).sum(0),
    "stack after images": lambda ys, gates, z: torch.stack(products(ys, gates), 1).sum(1),
    "stack last": lambda ys, gates, z: torch.stack(products(ys, gates), -1).sum(-1),
    "stack of each": lambda ys, gates, z: (torch.stack(ys) * torch.stack(gates)).sum(0),
    "stack and one gate": lambda ys, gates, z: (torch.stack(ys, 1) * gates[0].unsqueeze(1)).sum(1),
    "maps": lambda ys, gates, z: sum(
        (y.unflatten(1, (2, 4)) * gate.unsqueeze(1)).flatten(1, 2) for y, gate in zip(ys, gates, strict=True)
    ),
    "channels first": lambda ys, gates, z: torch.stack(
        [y.transpose(1, 2) * gate.transpose(1, 2) for y, gate in zip(ys, gates, strict=True)], 1
    ).sum(1).transpose(1, 2),
    "SiLU": lambda ys, gates, z: ys[0] * F.silu(z),
    "SiLU before": lambda ys, gates, z: F.silu(z) * F.layer_norm(ys[0], (D,)),
    "sigmoid": lambda ys, gates, z: ys[0] * z.sigmoid(),
    "SiLU for all tokens": lambda ys, gates, z: ys[0] * F.silu(z.mean(1, keepdim=True)),
    "SiLUs of each": lambda ys, gates, z: ys[0] * F.silu(ys[1]) + ys[2] * F.silu(z),
    "one of two is a SiLU": lambda ys, gates, z: ys[0] * F.silu(ys[1]) + ys[2] * z.sigmoid(),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_operator_of_the_same_codes(name):
    torch.manual_seed(0)
    plain = quantize(Gated(SPELLINGS[name]), [torch.randn(4, 8, D)], STATIC, progress=False)
    gm = fuse_lowered(copied(plain))
    assert counted(gm)["gate_quantize"] == 1
    left = {item.skip_reason for item in fusions(gm) if item.skip_reason}
    assert not [reason for reason in left if reason.endswith(("mul.Tensor", "add.Tensor", "sum.dim_IntList"))]
    for images in (1, 3):
        x = torch.randn(images, 8, D)
        torch.testing.assert_close(gm(x), plain(x), rtol=1e-3, atol=1e-3)


def test_silu_is_taken_in_the_operator_for_gates_of_every_token():
    silu = {}
    for name in ("SiLU", "SiLU for all tokens", "sigmoid", "one of two is a SiLU", "SiLUs of each"):
        torch.manual_seed(0)
        gm = fuse_lowered(quantize(Gated(SPELLINGS[name]), [torch.randn(4, 8, D)], STATIC, progress=False))
        (node,) = gm.graph.find_nodes(op="call_function", target=ops.gate_quantize.default)
        silu[name] = node.args[2]
    assert silu == {
        "SiLU": True, "SiLU for all tokens": False, "sigmoid": False, "one of two is a SiLU": False,
        "SiLUs of each": True,
    }  # fmt: skip


OTHERS = {
    "a term without a gate": lambda ys, gates, z: ys[0] * gates[0] + ys[1],
    "a number": lambda ys, gates, z: ys[0] * 0.5,
    "a gate of each token": lambda ys, gates, z: ys[0] * z.mean(-1, keepdim=True),
    "a scaled sum": lambda ys, gates, z: torch.add(ys[0] * gates[0], ys[1] * gates[1], alpha=2),
    "gates of a token and of all": lambda ys, gates, z: ys[0] * F.silu(ys[1]) + ys[2] * gates[0],
    "a difference": lambda ys, gates, z: ys[0] * gates[0] - ys[1] * gates[1],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_values_are_left_and_named(name):
    torch.manual_seed(0)
    plain = quantize(Gated(OTHERS[name]), [torch.randn(4, 8, D)], STATIC, progress=False)
    gm, x = fuse_lowered(copied(plain)), torch.randn(3, 8, D)
    assert "gate_quantize" not in counted(gm)
    assert sum(item.skip_reason is not None for item in fusions(gm)) >= 1
    torch.testing.assert_close(gm(x), plain(x), rtol=1e-3, atol=1e-3)


class Shown(Gated):
    def forward(self, x):
        gated = self.branches[0](x) * self.to_z(x).sigmoid()
        return self.out(gated), gated


def test_a_gated_value_with_other_readers_is_left_and_named():
    torch.manual_seed(0)
    plain = quantize(Shown(None), [torch.randn(4, 8, D)], STATIC, progress=False)
    gm, x = fuse_lowered(copied(plain)), torch.randn(3, 8, D)
    assert "the gated value has other readers" in {item.skip_reason for item in fusions(gm)}
    for ours, theirs in zip(gm(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dynamic_scales_are_left_and_named():
    torch.manual_seed(0)
    config = QuantConfig(activations={"granularity": Granularity.PER_TOKEN_DYNAMIC}, range_search=False)
    plain = quantize(Gated(SPELLINGS["SiLU"]), [torch.randn(4, 8, D)], config, progress=False)
    gm, x = fuse_lowered(copied(plain)), torch.randn(3, 8, D)
    assert "gate_quantize" not in counted(gm)
    reasons = {item.skip_reason for item in fusions(gm) if item.pattern == "gate + quantize"}
    assert reasons == {"the scale (per-token dynamic) is computed when the model runs"}
    assert torch.equal(gm(x), plain(x))


def test_bfloat16_reaches_both_inputs():
    torch.manual_seed(0)
    plain = quantize(Gated(SPELLINGS["SiLU"], 1), [torch.randn(4, 8, D)], STATIC, progress=False)
    half, x = fuse_lowered(copied(plain), torch.bfloat16), torch.randn(3, 8, D)
    (node,) = half.graph.find_nodes(op="call_function", target=ops.gate_quantize.default)
    assert {value.meta["val"].dtype for value in node.args[:2]} == {torch.bfloat16}
    torch.testing.assert_close(half(x), plain(x), rtol=0.05, atol=0.05)


def parts(places):
    """Products of parts of one tensor, in an order of their own."""

    def spelling(ys, gates, z):
        values = torch.stack(ys).softmax(-1)
        return sum(values[k] * gates[k] for k in places)

    return spelling


@pytest.mark.parametrize(
    ("places", "copied_values"),
    [((0, 1, 2), False), ((2, 0, 1), False), ((0, 1), True), ((1, 2), True), ((2, 1, 2), True)],
)
def test_parts_of_one_tensor_are_read_where_they_are(places, copied_values):
    """In whatever order they are added, each with its own gate; not of fewer or other parts."""
    torch.manual_seed(0)
    plain = quantize(Gated(parts(places)), [torch.randn(4, 8, D)], STATIC, progress=False)
    gm, x = fuse_lowered(copied(plain)), torch.randn(3, 8, D)
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.gate_quantize.default)
    assert node.args[0].target is (aten.stack.default if copied_values else aten.softmax.int)
    torch.testing.assert_close(gm(x), plain(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("images", [1, 3])
def test_gates_of_a_fixed_batch_are_fused(images, monkeypatch):
    """As torch.compile traces a model at first."""
    torch.manual_seed(0)
    plain = quantize(Gated(SPELLINGS["reduce"]), [torch.randn(4, 8, D)], STATIC, progress=False)
    seen, share = [], dynamo._share_constants
    monkeypatch.setattr(dynamo, "_share_constants", lambda gm, origin: seen.append(gm) or share(gm, origin))
    torch.compiler.reset()
    x = torch.randn(images, 8, D)
    with torch.no_grad():
        compiled = torch.compile(plain, backend="ptq4vm", options={"inductor": False})(x)
    assert counted(seen[0])["gate_quantize"] == 1
    torch.testing.assert_close(compiled, plain(x), rtol=1e-3, atol=1e-3)
