"""x (B, L, D) or (B, H, W, D), channel-first (B, D, L) or (B, D, H, W); W (N, D), K weights (K, N, D)."""

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers.strategies import integers
from safetensors.torch import save
from torch import nn

from ptq4vm.graph.capture import capture
from ptq4vm.graph.insert import attribute
from ptq4vm.graph.pipeline import Pipeline
from ptq4vm.graph.sites import find_linears
from ptq4vm.graph.verify import GraphStage
from ptq4vm.passes.prepare.canonicalize import canonicalize

aten = torch.ops.aten

# torch 2.11 warns about its own classes when a graph is copied
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: their products and sums are exact in any order."""
    return integers(-8, 7, *shape, seed=seed).float()


def filled(model: nn.Module) -> nn.Module:
    for i, parameter in enumerate(model.parameters()):
        parameter.data = whole(*parameter.shape, seed=i)
    return model


class Of(nn.Module):
    """A function of x and of parameters with the given shapes."""

    def __init__(self, function: Callable, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in zip(("weight", "bias"), shapes, strict=False):
            self.register_parameter(name, nn.Parameter(whole(*shape, seed=len(name))))

    def forward(self, x):
        return self.function(x, *self._parameters.values())


class In(nn.Module):
    """A module under the name `op`."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x)


@dataclass(frozen=True)
class Form:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of x, without the batch."""
    linears: dict[str, tuple[int, int, int]]
    """Tokens, channels in and channels out of each, in order."""


def of(function: Callable, *shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: In(Of(function, *shapes))


def layer(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: In(filled(make()))


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
    "x @ W.mT": Form(of(lambda x, w: x @ w.transpose(-1, -2), (4, 6)), (3, 6), one(3, 6, 4)),
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


def canonical(model: nn.Module, shape: tuple[int, ...]) -> torch.fx.GraphModule:
    return canonicalize(capture(model, (whole(2, *shape),)))


def targets(gm) -> list:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


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
    products = {aten.matmul.default, aten.einsum.default, aten.conv1d.default, aten.conv2d.default}
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


# --- what stays ---


LEFT = {
    "a linear without tokens": ((6,), "no tokens", layer(lambda: nn.Linear(6, 4))(), aten.linear.default),
    "a linear on tokens first": (
        (3, 6),
        "first axis of its input is not the batch",
        of(lambda x, w: F.linear(x.transpose(0, 1), w), (4, 6))(),
        aten.linear.default,
    ),
    "a matmul without tokens": ((6,), "no tokens", of(lambda x, w: x @ w, (6, 4))(), aten.linear.default),
    "mm on merged tokens": (
        (3, 6),
        "no tokens",
        of(lambda x, w: torch.mm(x.flatten(0, 1), w), (6, 4))(),
        aten.linear.default,
    ),
    "addmm on merged tokens": (
        (3, 6),
        "no tokens",
        of(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), (6, 4), (4,))(),
        aten.linear.default,
    ),
    "W @ x on merged tokens": (
        (3, 6),
        "no tokens",
        of(lambda x, w: w @ x.flatten(0, 1).t(), (4, 6))(),
        aten.matmul.default,
    ),
    "a scaled addmm": (
        (6,),
        r"a bias \(N,\)",
        of(lambda x, w, c: torch.addmm(c, x, w, beta=2), (6, 4), (4,))(),
        aten.addmm.default,
    ),
    "bmm": ((3, 6), "no tokens", of(lambda x, p: torch.bmm(x.transpose(0, 1), p), (3, 6, 4))(), aten.bmm.default),
    "baddbmm": (
        (3, 6),
        r"a bias \(N,\)",
        of(lambda x, p, c: torch.baddbmm(c, x.transpose(0, 1), p), (3, 6, 4), (3, 1, 4))(),
        aten.baddbmm.default,
    ),
    "an expanded weight": ((3, 5, 6), "axis of size one", of(lambda x, p: x @ p, (1, 6, 4))(), aten.matmul.default),
    "einsum over tokens": (
        (3, 6),
        "more than a sum over channels",
        of(lambda x, w: torch.einsum("bld,nd->bn", x, w), (4, 6))(),
        aten.einsum.default,
    ),
    "einsum over two axes": (
        (3, 2, 6),
        r"not a row of matrices",
        of(lambda x, w: torch.einsum("bled,ned->bln", x, w), (4, 2, 6))(),
        aten.einsum.default,
    ),
    "einsum without an arrow": (
        (3, 6),
        "'bld,dn' is not of the form",
        of(lambda x, w: torch.einsum("bld,dn", x, w), (6, 4))(),
        aten.einsum.default,
    ),
    "einsum of three": (
        (3, 6),
        "is not of the form",
        of(lambda x, w: torch.einsum("bld,nd,bld->bln", x, w, x), (4, 6))(),
        aten.einsum.default,
    ),
    "a strided 1×1 convolution": (
        (6, 4, 4),
        r"stride \[2, 2\]",
        layer(lambda: nn.Conv2d(6, 4, 1, stride=2))(),
        aten.conv2d.default,
    ),
    "a padded 1×1 convolution": (
        (6, 4),
        r"padding \[1\]",
        layer(lambda: nn.Conv1d(6, 4, 1, padding=1))(),
        aten.conv1d.default,
    ),
    "a 1×1 convolution of a 1×1 map": (
        (6, 1, 1),
        "no tokens",
        layer(lambda: nn.Conv2d(6, 4, 1))(),
        aten.conv2d.default,
    ),
    "a convolution of length one": ((6, 1), "no tokens", layer(lambda: nn.Conv1d(6, 4, 1))(), aten.conv1d.default),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_is_reported_in_one_line(name, caplog):
    shape, why, model, operator = LEFT[name]
    with caplog.at_level(logging.INFO, logger="ptq4vm"):
        gm = canonical(model, shape)
    assert targets(gm).count(operator) == 1 and find_linears(gm) == {}
    (record,) = [record for record in caplog.records if record.name == "ptq4vm.passes.prepare.canonicalize"]
    (node,) = gm.graph.find_nodes(op="call_function", target=operator)
    message = record.getMessage()
    assert message.startswith(f"{node.name} ({operator} in op) stays in floating point: ")
    assert re.search(why, message)
    assert torch.equal(gm(whole(3, *shape)), model(whole(3, *shape)))


SILENT = {
    "a depth-wise 1×1 convolution": ((6, 3, 5), lambda: nn.Conv2d(6, 6, 1, groups=6), aten.conv2d.default),
    "a 3×3 convolution": ((6, 3, 5), lambda: nn.Conv2d(6, 4, 3, padding=1), aten.conv2d.default),
    "a product of activations": ((3, 6), lambda: Of(lambda x: x @ x.transpose(1, 2)), aten.matmul.default),
    "a product with a vector": (
        (3, 6),
        lambda: Of(lambda x, w: torch.einsum("bld,d->bl", x, w), (6,)),
        aten.einsum.default,
    ),
    "a product of weights": ((4, 6), lambda: Of(lambda x, w: x + (w @ w.t()).sum(), (4, 6)), aten.matmul.default),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_is_no_product_of_channels_with_a_matrix_stays(name, caplog):
    shape, make, operator = SILENT[name]
    model = filled(make())
    with caplog.at_level(logging.INFO, logger="ptq4vm"):
        gm = canonical(model, shape)
    assert operator in targets(gm) and aten.linear.default not in targets(gm)
    assert not [record for record in caplog.records if record.name == "ptq4vm.passes.prepare.canonicalize"]
    assert torch.equal(gm(whole(3, *shape)), model(whole(3, *shape)))


def test_blocks_are_told_apart():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = Of(lambda x, p: sum(F.linear(x, w) for w in p), (2, 6, 6))

        def forward(self, x):
            return self.op(x)

    gm = canonical(nn.Sequential(Block(), Block()), (3, 6))
    assert [(site.name, site.block) for site in find_linears(gm).values()] == [
        (f"{i}.op.weight.{k}", str(i)) for i in range(2) for k in range(2)
    ]


def test_models_without_products_stay_as_they_are(small_vim, images):
    gm = capture(small_vim, (images,))
    before = targets(gm)
    assert targets(canonicalize(gm)) == before


class Scores(nn.Module):
    """An einsum of two activations, which is no linear, before one with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        scores = torch.einsum("bld,bmd->blm", x, x).softmax(-1)
        return torch.einsum("bld,nd->bln", scores @ x, self.weight)


def test_an_einsum_of_activations_hides_no_later_linear():
    gm = canonicalize(capture(Scores().eval(), (torch.randn(2, 5, 8),)))
    assert [site.weight for site in find_linears(gm).values()] == ["weight"]
