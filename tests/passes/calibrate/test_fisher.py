import pytest
import torch
from helpers.strategies import normal

from ptq4vm import QuantConfig
from ptq4vm.graph.partition import partition_blocks
from ptq4vm.passes.calibrate import fisher
from ptq4vm.passes.calibrate.fisher import FLOOR, fisher_diagonal
from ptq4vm.passes.quantized_nodes import quantized_linears

WEIGHT = normal(5, 4, seed=3)


def quiet(batch, batches):
    pass


def piece(function, *outputs, results=()):
    """A block that computes a function of named values."""

    def run(values):
        return dict(zip(outputs, function(values), strict=True))

    run.outputs, run.results = outputs, results
    return run


stem = piece(lambda values: [values["x"] * 2], "h")


def logits(values):
    """From the first two of three tokens, the second twice as loud."""
    return [(values["h"][:, 0] + 2 * values["h"][:, 1]) @ WEIGHT.t()]


head = piece(logits, "y", results=("y",))


def test_it_is_the_diagonal_of_the_fisher_matrix(monkeypatch):
    monkeypatch.setattr(fisher, "PROBES", 4000)
    x = normal(3, 3, 4)
    found = fisher_diagonal([stem, head], {"x": x}, 0, quiet)[0]["h"] - FLOOR
    exact = torch.zeros(3, 4)
    for image in x:
        p = head(stem({"x": image[None]}))["y"][0].softmax(0)
        one = (WEIGHT.t() @ (p.diag() - p.outer(p)) @ WEIGHT).diag()  # JᵀFJ of a token that counts once
        exact += torch.stack([one, 4 * one, torch.zeros(4)])
    torch.testing.assert_close(found, exact / exact.mean(), rtol=0.1, atol=1e-6)


def test_what_does_not_matter_still_counts_a_tenth_of_the_mean():
    found = fisher_diagonal([stem, head], {"x": normal(3, 3, 4)}, 0, quiet)[0]["h"]
    assert torch.equal(found[2], torch.full((4,), 0.1))
    assert found.mean().item() == pytest.approx(1.1)


def test_an_output_on_the_way_counts_too():
    """An early block's value that the model returns, and one that only a scalar depends on."""
    three = lambda values: [values["x"] * 2, values["x"] * 3, values["x"].sum() * 4]  # noqa: E731
    early = piece(three, "h", "g", "s", results=("g", "s"))
    early.outputs = ("h", "g")
    first, _ = fisher_diagonal([early, head], {"x": normal(3, 3, 4)}, 0, quiet)
    assert set(first) == {"h", "g"} and (first["g"] > 0.1).all()
    scalar = piece(lambda values: [values["h"][:, :2].mean()], "y", results=("y",))
    scalar.outputs = ()
    (found, _) = fisher_diagonal([stem, scalar], {"x": normal(3, 3, 4)}, 0, quiet)
    assert torch.equal(found["h"][2], torch.full((4,), 0.1)) and torch.allclose(found["h"][:2], torch.tensor(1.6))


def test_outputs_that_are_no_logits_count_by_their_squared_error(monkeypatch):
    monkeypatch.setattr(fisher, "PROBES", 4000)
    scaled = piece(lambda values: [values["h"] * torch.tensor([1.0, 3.0])], "y", results=("y",))
    features = fisher_diagonal([stem, scaled], {"x": normal(2, 3, 2)}, 0, quiet)
    torch.testing.assert_close(features[0]["h"] - FLOOR, torch.tensor([0.2, 1.8]).expand(3, 2), rtol=0.1, atol=0)


@pytest.fixture
def parts(roads):
    gm = roads.prepared(QuantConfig())
    linears = quantized_linears(gm)
    return partition_blocks(gm, [linear.node for linear in linears])


def test_of_the_last_block_the_class_token_alone_matters(parts, images):
    last = fisher_diagonal(parts, {"x": images}, 0, quiet)[-2]
    before, mixed = (last[name] for name in parts[-2].outputs)  # the stream before the block goes through its mixer too
    assert (mixed.amax(-1) > FLOOR).sum() == 1 and (before.amax(-1) > FLOOR).all()
    assert mixed.mean().item() == pytest.approx(1 + FLOOR)


def test_one_seed_gives_the_same_diagonal_and_no_gradient_stays(parts, images):
    first, second, other = (fisher_diagonal(parts, {"x": images}, seed, quiet) for seed in (0, 0, 1))
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]) and not torch.equal(value, other[1][name])
        assert not value.requires_grad
