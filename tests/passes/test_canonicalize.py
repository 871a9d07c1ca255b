"""x (B, L, D) or (B, H, W, D), W (D, N)."""

import pytest
import torch
from strategies import integers
from torch import nn

from ptq4vm.graph import Pipeline, capture, find_linears
from ptq4vm.passes.canonicalize import CANONICALIZE, linears_on_tokens, matmul_to_linear, unshare_transposes

aten = torch.ops.aten


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: their products and sums are exact in any order."""
    return integers(-8, 7, *shape, seed=seed).float()


class Product(nn.Module):
    """One product with a parameter, written in some way."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(whole(6, 4, seed=1))
        self.bias = nn.Parameter(whole(4, seed=2))

    def forward(self, x):
        match self.form:
            case "x @ W":
                return x @ self.weight
            case "mm":
                return torch.mm(x.flatten(0, 1), self.weight).unflatten(0, x.shape[:2])
            case "addmm":
                return torch.addmm(self.bias, x.flatten(0, 1), self.weight).unflatten(0, x.shape[:2])
            case "linear":
                return nn.functional.linear(x, self.weight.t(), self.bias)
            case "x @ x":
                return x @ x.transpose(1, 2)


class Transposed(nn.Module):
    """x @ Wᵀ with W (N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole(4, 6, seed=1))

    def forward(self, x):
        return x @ self.weight.t()


class Twice(nn.Module):
    """One weight, two products."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole(6, 6, seed=1))

    def forward(self, x):
        return (x @ self.weight) @ self.weight.t()


def targets(gm) -> list:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def check(model: nn.Module, x: torch.Tensor, passes=CANONICALIZE):
    """Runs the passes and holds them to their laws; the graph after them."""
    gm = capture(model, (x,))
    pipeline = Pipeline(passes)
    result = pipeline(gm)
    for images in (1, 2, 5):
        y = whole(images, *x.shape[1:], seed=images)
        assert torch.equal(result(y), model(y))
    code = result.code
    assert pipeline(result).code == code
    calls = [node for node in result.graph.nodes if node.op == "call_function"]
    assert all("val" in node.meta for node in calls)
    return result


FORMS = {
    "x @ W": lambda: Product("x @ W"),
    "x @ W.t()": Transposed,
    "mm": lambda: Product("mm"),
    "addmm": lambda: Product("addmm"),
    "linear": lambda: Product("linear"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_product_becomes_a_linear(form):
    gm = check(FORMS[form](), whole(2, 3, 6))
    found = targets(gm)
    assert found.count(aten.linear.default) == 1
    assert not {aten.matmul.default, aten.mm.default, aten.addmm.default} & set(found)


@pytest.mark.parametrize("form", ["x @ W", "x @ W.t()", "linear"])
def test_a_linear_on_tokens_is_found_with_its_shape(form):
    (site,) = find_linears(check(FORMS[form](), whole(2, 3, 6)))
    assert (site.weight, site.tokens) == ("weight", 3)
    assert {site.in_features, site.out_features} == {4, 6}
    assert site.node.args[1].meta["val"].shape == (4, 6)


@pytest.mark.parametrize("form", ["x @ W", "x @ W.t()", "linear"])
def test_rows_and_columns_become_tokens(form):
    gm = check(FORMS[form](), whole(2, 3, 5, 6))
    (site,) = find_linears(gm)
    assert site.tokens == 15
    assert targets(gm).count(aten.linear.default) == 1


def test_two_transposes_in_a_row_cancel():
    gm = check(Transposed(), whole(2, 3, 6))
    assert aten.t.default not in targets(gm)


def test_a_weight_may_be_used_in_both_directions():
    gm = check(Twice(), whole(2, 3, 6))
    assert [site.name for site in find_linears(gm)] == ["weight_linear", "weight_linear@1"]


def test_a_product_of_activations_stays():
    gm = check(Product("x @ x"), whole(2, 3, 6))
    assert aten.matmul.default in targets(gm) and aten.linear.default not in targets(gm)


def test_a_linear_without_tokens_stays():
    gm = check(nn.Linear(6, 4).requires_grad_(False), whole(2, 6))
    assert aten.flatten.using_ints not in targets(gm)
    assert find_linears(gm) == []


@pytest.mark.parametrize("step", [matmul_to_linear, unshare_transposes, linears_on_tokens])
def test_each_pass_alone_keeps_the_function(step):
    for model in (Transposed(), Twice(), Product("addmm"), Product("linear")):
        check(model, whole(2, 3, 6), (step,))
    check(Product("linear"), whole(2, 3, 5, 6), (step,))


def test_passes_keep_where_a_node_comes_from():
    model = nn.Sequential(nn.Sequential(Twice(), Twice()))
    gm = check(model, whole(2, 3, 6))
    assert [site.block for site in find_linears(gm)] == ["0", "0", "0", "0"]


def test_models_without_products_stay_as_they_are(small_vim, images):
    gm = capture(small_vim, (images,))
    before = targets(gm)
    assert targets(Pipeline(CANONICALIZE)(gm)) == before
