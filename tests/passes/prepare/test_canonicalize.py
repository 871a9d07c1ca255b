"""x (B, L, D) or (B, H, W, D), channel-first (B, D, L) or (B, D, H, W); W (N, D), K weights (K, N, D)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers.products import aten, canonical, layer, of, targets, whole
from safetensors.torch import save
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.graph.insert import attribute
from ptq4vm.graph.pipeline import Pipeline
from ptq4vm.graph.sites import find_linears
from ptq4vm.graph.verify import GraphStage
from ptq4vm.passes.prepare.canonicalize import READERS, canonicalize

# torch 2.11 warns about its own classes when a graph is copied
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


@dataclass(frozen=True)
class Form:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """The shape of x, without the batch."""
    linears: dict[str, tuple[int, int, int]]
    """Tokens, channels in and channels out of each, in order."""


def one(*sizes: int) -> dict[str, tuple[int, int, int]]:
    return {"op": sizes}


def each(count: int, *sizes: int, name: str = "op.weight.{}") -> dict[str, tuple[int, int, int]]:
    return {name.format(k): sizes for k in range(count)}


FORMS = {
    # one weight
    "linear": Form(of(lambda x, w, b: F.linear(x, w, b), (4, 6), (4,)), (3, 6), one(3, 6, 4)),
    "linear, rows and columns": Form(of(lambda x, w: F.linear(x, w), (4, 6)), (3, 5, 6), one(15, 6, 4)),
    "linear, transposed": Form(of(lambda x, w: F.linear(x, w.t()), (6, 4)), (3, 6), one(3, 6, 4)),
    "x @ W": Form(of(lambda x, w: x @ w, (6, 4)), (3, 6), one(3, 6, 4)),
    "x @ W, rows and columns": Form(of(lambda x, w: x @ w, (6, 4)), (3, 5, 6), one(15, 6, 4)),
    "x @ W.t()": Form(of(lambda x, w: x @ w.t(), (4, 6)), (3, 6), one(3, 6, 4)),
    "x @ W.transpose": Form(of(lambda x, w: x @ w.transpose(-1, -2), (4, 6)), (3, 6), one(3, 6, 4)),
    "x @ W.mT": Form(of(lambda x, w: x @ w.mT, (4, 6)), (3, 6), one(3, 6, 4)),
    "x @ W.swapaxes": Form(of(lambda x, w: x @ w.swapaxes(0, 1), (4, 6)), (3, 6), one(3, 6, 4)),
    "rows in another order": Form(of(lambda x, w: F.linear(x, w[[2, 0, 3, 1]]), (4, 6)), (3, 6), one(3, 6, 4)),
    "one of the weights, by a list": Form(
        of(lambda x, w: torch.einsum("bld,knd->bln", x, w[[1]]), (3, 4, 6)), (3, 6), {"op.weight.1": (3, 6, 4)}
    ),
    "W @ x": Form(of(lambda x, w: w @ x, (4, 6)), (6, 3), one(3, 6, 4)),
    "einsum": Form(of(lambda x, w: torch.einsum("b l d, n d -> b l n", x, w), (4, 6)), (3, 6), one(3, 6, 4)),
    "einsum, W first": Form(of(lambda x, w: torch.einsum("dn,bld->bln", w, x), (6, 4)), (3, 6), one(3, 6, 4)),
    "einsum, ellipsis": Form(
        of(lambda x, w: torch.einsum("... d, n d -> ... n", x, w), (4, 6)), (3, 5, 6), one(15, 6, 4)
    ),
    "einsum, channel first": Form(
        of(lambda x, w: torch.einsum("B D H W, N D -> B N H W", x, w), (4, 6)), (6, 3, 5), one(15, 6, 4)
    ),
    # 1×1 convolutions
    "conv1d": Form(layer(lambda: nn.Conv1d(6, 4, 1)), (6, 3), one(3, 6, 4)),
    "conv2d": Form(layer(lambda: nn.Conv2d(6, 4, 1)), (6, 3, 5), one(15, 6, 4)),
    "conv2d, no bias": Form(layer(lambda: nn.Conv2d(6, 4, 1, bias=False)), (6, 3, 5), one(15, 6, 4)),
    "conv2d, dilated": Form(layer(lambda: nn.Conv2d(6, 4, 1, dilation=2)), (6, 3, 5), one(15, 6, 4)),
    "conv2d, one column": Form(layer(lambda: nn.Conv2d(6, 4, 1)), (6, 3, 1), one(3, 6, 4)),
    "Linear2d": Form(of(lambda x, w, b: F.conv2d(x, w[:, :, None, None], b), (4, 6), (4,)), (6, 3, 5), one(15, 6, 4)),
    # views of a whole weight
    "squeezed": Form(of(lambda x, w: F.linear(x, w.squeeze(-1)), (4, 6, 1)), (3, 6), one(3, 6, 4)),
    "reshaped": Form(of(lambda x, w: F.linear(x, w.reshape(4, 6)), (2, 2, 6)), (3, 6), one(3, 6, 4)),
    "permuted": Form(of(lambda x, w: F.linear(x, w.permute(2, 0, 1).flatten(1)), (2, 3, 4)), (3, 6), one(3, 6, 4)),
    # K weights
    "P[k]": Form(of(lambda x, p: sum(F.linear(x, p[k]) for k in range(3)), (3, 4, 6)), (5, 6), each(3, 5, 6, 4)),
    "for w in P": Form(of(lambda x, p: sum(F.linear(x, w) for w in p), (3, 4, 6)), (5, 6), each(3, 5, 6, 4)),
    "P[-1]": Form(of(lambda x, p: F.linear(x, p[-1]), (3, 4, 6)), (5, 6), {"op.weight.2": (5, 6, 4)}),
    "P[i][j]": Form(of(lambda x, p: F.linear(x, p[1][0]), (2, 3, 4, 6)), (5, 6), {"op.weight.1_0": (5, 6, 4)}),
    "chunk": Form(
        of(lambda x, p: torch.cat([F.linear(x, w) for w in p.chunk(2)], -1), (8, 6)), (5, 6), each(2, 5, 6, 4)
    ),
    "split": Form(
        of(lambda x, p: torch.cat([F.linear(x, w) for w in p.split([2, 3])], -1), (5, 6)),
        (3, 6),
        {"op.weight.0_2": (3, 6, 2), "op.weight.2_5": (3, 6, 3)},
    ),
    "slices": Form(
        of(lambda x, w, b: F.linear(x, w[2:5, :4], b[2:5]), (7, 8), (7,)), (3, 4), {"op.weight.2_5_0": (3, 4, 3)}
    ),
    "rows and columns of P": Form(
        of(lambda x, p: F.linear(x, p[0]) + F.linear(x, p[:, 0]), (4, 4, 6)),
        (3, 6),
        {"op.weight.0": (3, 6, 4), "op.weight.0_": (3, 6, 4)},
    ),
    "x @ P": Form(of(lambda x, p: x @ p, (3, 6, 4)), (3, 5, 6), each(3, 5, 6, 4)),
    "P @ x": Form(of(lambda x, p: p @ x, (3, 4, 6)), (3, 6, 5), each(3, 5, 6, 4)),
    "einsum, x_proj": Form(
        of(lambda x, p: torch.einsum("b k d l, k c d -> b k c l", x, p), (3, 4, 6)), (3, 6, 5), each(3, 5, 6, 4)
    ),
    "einsum, dt_proj": Form(
        of(lambda x, p: torch.einsum("b k r l, k d r -> b k d l", x, p), (3, 6, 4)), (3, 4, 5), each(3, 5, 4, 6)
    ),
    "einsum, groups last": Form(
        of(lambda x, p: torch.einsum("dnk,...dk->...kn", p, x), (6, 4, 3)), (5, 6, 3), each(3, 5, 6, 4)
    ),
    # groups
    "conv1d of P": Form(of(lambda x, p: F.conv1d(x, p.view(-1, 6, 1), groups=3), (3, 4, 6)), (18, 5), each(3, 5, 6, 4)),
    "conv1d of P with a bias": Form(
        of(lambda x, p, b: F.conv1d(x, p.view(-1, 6, 1), b.view(-1), groups=3), (3, 4, 6), (3, 4)),
        (18, 5),
        each(3, 5, 6, 4),
    ),
    "conv1d in groups": Form(layer(lambda: nn.Conv1d(18, 12, 1, groups=3)), (18, 5), each(3, 5, 6, 4)),
    "conv2d in groups": Form(layer(lambda: nn.Conv2d(18, 12, 1, groups=3)), (18, 5, 2), each(3, 10, 6, 4)),
    # weights with axes of size one, or repeated
    "W (1, N, D) @ x": Form(of(lambda x, w: w.view(1, 4, 6) @ x, (4, 6)), (6, 3), one(3, 6, 4)),
    "x @ W (1, D, N)": Form(of(lambda x, w: x @ w, (1, 6, 4)), (3, 5, 6), one(15, 6, 4)),
    "bmm, expanded": Form(
        of(lambda x, w: torch.bmm(x, w.t().unsqueeze(0).expand(x.shape[0], -1, -1)), (4, 6)), (3, 6), one(3, 6, 4)
    ),
    "bmm, repeated": Form(of(lambda x, w: torch.bmm(x, w.repeat(x.shape[0], 1, 1)), (6, 4)), (3, 6), one(3, 6, 4)),
    "baddbmm, expanded": Form(
        of(lambda x, w, b: torch.baddbmm(b, x, w.expand(x.shape[0], 6, 4)), (6, 4), (4,)), (3, 6), one(3, 6, 4)
    ),
    "einsum, expanded": Form(
        of(lambda x, w: torch.einsum("bnd,bld->bln", w.expand(x.shape[0], 4, 6), x), (4, 6)), (3, 6), one(3, 6, 4)
    ),
    "one x for K weights": Form(of(lambda x, p: x.unsqueeze(1) @ p, (2, 6, 4)), (3, 6), one(3, 6, 8)),
    # several axes of channels
    "einsum over heads": Form(of(lambda x, w: torch.einsum("blhd,hdn->bln", x, w), (2, 3, 4)), (5, 2, 3), one(5, 6, 4)),
    "einsum to heads": Form(of(lambda x, w: torch.einsum("bld,hnd->bhln", x, w), (2, 4, 6)), (3, 6), one(3, 6, 8)),
    "einsum in two groups": Form(
        of(lambda x, w: torch.einsum("bgkdl,gknd->bgknl", x, w), (2, 2, 4, 6)),
        (2, 2, 6, 3),
        {f"op.weight.{g}_{k}": (3, 6, 4) for g in range(2) for k in range(2)},
    ),
    "tensordot": Form(of(lambda x, w: torch.tensordot(x, w, ([2], [1])), (4, 6)), (3, 6), one(3, 6, 4)),
    "tensordot, W first": Form(of(lambda x, w: torch.tensordot(w, x, ([1], [2])), (4, 6)), (3, 6), one(3, 6, 4)),
    "inner": Form(of(lambda x, w: torch.inner(x, w), (4, 6)), (3, 6), one(3, 6, 4)),
    # tokens before the batch, or in one axis with it
    "(L, B, D)": Form(of(lambda x, w: F.linear(x.transpose(0, 1), w), (4, 6)), (3, 6), one(3, 6, 4)),
    "(B·L, D)": Form(of(lambda x, w, b: F.linear(x.flatten(0, 1), w, b), (4, 6), (4,)), (3, 6), one(3, 6, 4)),
    "(L·B, D)": Form(of(lambda x, w: F.linear(x.transpose(0, 1).flatten(0, 1), w), (4, 6)), (3, 6), one(3, 6, 4)),
    "(H·B·W, D)": Form(of(lambda x, w: x.transpose(0, 1).flatten(0, 2) @ w, (6, 4)), (3, 2, 6), one(6, 6, 4)),
    "W @ (D, B·L)": Form(of(lambda x, w: w @ x.permute(2, 0, 1).reshape(6, -1), (4, 6)), (3, 6), one(3, 6, 4)),
    "W @ (D, L·B)": Form(of(lambda x, w: w @ x.permute(2, 1, 0).reshape(6, -1), (4, 6)), (3, 6), one(3, 6, 4)),
    "addmm": Form(of(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), (6, 4), (4,)), (3, 6), one(3, 6, 4)),
    "addmm to one channel": Form(
        of(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), (6, 1), (1,)), (3, 6), one(3, 6, 1)
    ),
    "addmm, W first": Form(
        of(lambda x, w, b: torch.addmm(b, w, x.flatten(0, 1).t()), (4, 6), (4, 1)), (3, 6), one(3, 6, 4)
    ),
    "einsum, folded": Form(
        of(lambda x, w: torch.einsum("nd,md->nm", w, x.flatten(0, 1)), (4, 6)), (3, 6), one(3, 6, 4)
    ),
    "windows": Form(
        of(lambda x, w: F.linear(x.unflatten(1, (2, 2)).transpose(1, 2).flatten(0, 1), w), (4, 6)), (4, 6), one(4, 6, 4)
    ),
    "conv2d of windows": Form(of(lambda x, w: F.conv2d(x.flatten(0, 1), w), (4, 6, 1, 1)), (2, 6, 3, 5), one(30, 6, 4)),
    "conv1d without a batch": Form(
        of(lambda x, w: F.conv1d(x.permute(2, 0, 1).reshape(6, -1), w), (4, 6, 1)), (3, 6), one(3, 6, 4)
    ),
    "directions in the batch": Form(
        of(lambda x, w: F.linear(torch.cat((x, x.flip(1))), w), (4, 6)), (3, 6), one(6, 6, 4)
    ),
    # one weight, several uses
    "twice": Form(
        of(lambda x, w: F.linear(F.linear(x, w).relu(), w), (6, 6)),
        (3, 6),
        {"op": (3, 6, 6), "op@1": (3, 6, 6)},
    ),
    "in both directions": Form(of(lambda x, w: (x @ w) @ w.t(), (6, 4)), (3, 6), {"op": (3, 6, 4), "op@1": (3, 4, 6)}),
    "P[0] twice": Form(
        of(lambda x, p: F.linear(F.linear(x, p[0]), p.view(-1, 6)[:6]), (2, 6, 6)),
        (3, 6),
        {"op.weight.0": (3, 6, 6), "op.weight.0@1": (3, 6, 6)},
    ),
    "P[0] and P.sum()": Form(
        of(lambda x, p: F.linear(x, p[0]) + p.sum(), (2, 4, 6)), (3, 6), {"op.weight_linear.0": (3, 6, 4)}
    ),
    "the whole of P and P.sum()": Form(
        of(lambda x, p: F.linear(x, p.flatten(0, 1)) + p.sum(), (2, 4, 6)), (3, 6), {"op.weight_linear": (3, 6, 8)}
    ),
    "the whole of P and P[0]": Form(
        of(lambda x, p: F.linear(x, p[0]) + F.linear(x, p.flatten(0, 1)), (2, 1, 6)),
        (3, 6),
        {"op.weight_linear.0": (3, 6, 1), "op": (3, 6, 2)},
    ),
}


class Case:
    """A form's model, and its graph after the passes."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.model = form.model()
        self.captured = capture(self.model, (self.x(2),))
        self.gm = canonicalize(copy.deepcopy(self.captured))
        self.sites = find_linears(self.gm)

    def x(self, images: int) -> torch.Tensor:
        return whole(images, *self.form.shape, seed=images)


@pytest.fixture(scope="module", params=FORMS)
def case(request) -> Case:
    return Case(FORMS[request.param])


def test_the_result_is_the_same(case):
    for images in (1, 3, 5):
        assert torch.equal(case.gm(case.x(images)), case.model(case.x(images)))


def test_every_product_becomes_linears_on_tokens(case):
    found = {site.name: (site.tokens, site.in_features, site.out_features) for site in case.sites.values()}
    assert list(found.items()) == list(case.form.linears.items())
    products = {*READERS} - {aten.linear.default}
    called = targets(case.gm)
    assert not products & set(called) and called.count(aten.linear.default) == len(found)


def test_every_weight_is_a_matrix_with_its_own_memory(case):
    for node, site in case.sites.items():
        weight = attribute(case.gm, site.weight)
        assert isinstance(weight, nn.Parameter) and weight.requires_grad and weight.is_contiguous()
        assert sorted(weight.shape) == sorted((site.out_features, site.in_features))
        assert len(node.args[1].users) == 1  # or one fake-quantizer would serve several calls
    read = {str(node.target) for node in case.gm.graph.find_nodes(op="get_attr")}
    assert {name for name, _ in case.gm.named_parameters()} == read
    assert save(case.gm.state_dict())  # which refuses tensors that share memory


def test_every_parameter_has_a_gradient(case):
    case.gm(case.x(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in case.gm.parameters())


def test_frozen_weights_stay_frozen(case):
    gm = copy.deepcopy(case.captured).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in canonicalize(gm).parameters())


def test_nodes_keep_their_metadata(case):
    calls = [node for node in case.gm.graph.nodes if node.op == "call_function" and node.name != "check_input"]
    for node in calls:
        assert "val" in node.meta
        assert [path for path, _ in node.meta["nn_module_stack"].values()][:2] == ["", "op"]


def test_a_second_time_changes_nothing(case):
    again = canonicalize(copy.deepcopy(case.gm))
    assert again.code == case.gm.code and list(again.state_dict()) == list(case.gm.state_dict())


def test_a_second_capture_gives_the_same_names(case):
    again = Case(case.form).gm
    assert again.code == case.gm.code and list(again.state_dict()) == list(case.gm.state_dict())


def test_each_pass_alone_keeps_the_function(case):
    for step in canonicalize.passes:
        gm = Pipeline(GraphStage.CAPTURED, (step,))(copy.deepcopy(case.captured))
        assert torch.equal(gm(case.x(3)), case.model(case.x(3)))


class Viewed(nn.Module):
    """Flattens a result without a copy, in its order in memory."""

    def __init__(self, inner: nn.Module, order: list[int]) -> None:
        super().__init__()
        self.inner, self.order = inner, order

    def forward(self, x):
        return self.inner(x).permute(self.order).view(-1)


def test_the_result_has_the_same_order_in_memory(case):
    result = case.model(case.x(2))
    model = Viewed(case.model, sorted(range(result.dim()), key=result.stride, reverse=True))
    assert torch.equal(canonical(model, case.form.shape)(case.x(3)), model(case.x(3)))


def test_an_old_parameter_stays_only_where_it_is_read():
    used = canonical(FORMS["P[0] and P.sum()"].model(), (3, 6))
    assert sorted(used.state_dict()) == ["op.weight", "op.weight_linear.0.weight"]
    unused = canonical(FORMS["conv1d of P with a bias"].model(), (18, 5))
    assert sorted(unused.state_dict()) == [f"op.{name}.{k}.{name}" for name in ("bias", "weight") for k in range(3)]


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", whole(2, 4, 6))

    def forward(self, x):
        return F.linear(x, self.weight[1])


def test_a_stacked_weight_may_be_a_buffer():
    gm = canonical(Buffered(), (3, 6))
    assert [name for name, _ in gm.named_buffers()] == ["weight.1.weight"] and not list(gm.parameters())
    assert torch.equal(gm(whole(3, 3, 6)), Buffered()(whole(3, 3, 6)))


def test_a_name_that_is_taken_is_left_alone():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(whole(2, 4, 6))
            self.p_linear = nn.ModuleList([nn.Linear(6, 4, bias=False)])

        def forward(self, x):
            return F.linear(x, self.p[0]) + self.p_linear[0](x) + self.p.sum()

    model = Model()
    model.p_linear[0].weight.data = whole(4, 6, seed=1)
    gm = canonical(model, (3, 6))
    assert torch.equal(gm(whole(3, 3, 6)), model(whole(3, 3, 6)))
    assert sorted(gm.state_dict()) == ["p", "p_linear.0.weight", "p_linear.0_.weight"]
