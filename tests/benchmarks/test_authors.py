"""benchmarks/authors.py: rows of the authors' repositories, with a clone of our own in their place."""

import argparse
import sys

import pytest
import torch
from helpers.fake_packages import packages

from benchmarks import authors, authors_stubs
from benchmarks.authors_repositories import REPOSITORIES, Repository
from benchmarks.authors_worker import Road

MODEL = """
    import framework
    from framework.parts import ModuleList, register
    from mamba_ssm import Mamba
    import torch

    @register()
    class Model(torch.nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.layers, self.head = ModuleList([Mamba(dim, d_state=4)]), torch.nn.Linear(dim, 3)
            self.gate = torch.nn.Linear(dim, dim)

        def forward(self, x):
            x = x.flatten(2).transpose(1, 2)
            for layer in self.layers:
                x = x + layer(x)
            return x, self.head((x * self.gate(x.mean(1)).unsqueeze(1)).mean(1))
"""
BROKEN = "raise RuntimeError('a package\\nof two lines')"


@pytest.fixture
def clones(tmp_path):
    """A repository whose package needs a framework that is not there, and another that does not import."""
    path, finders = list(sys.path), list(sys.meta_path)
    files = {"Own/pack/__init__.py": BROKEN, "Own/pack/model.py": MODEL}
    with packages(tmp_path, files):
        yield tmp_path
    sys.path[:], sys.meta_path[:] = path, finders
    for name in [name for name in sys.modules if name.split(".")[0] in ("pack", "framework")]:
        del sys.modules[name]


def repository(**options):
    known = {"model": "pack.model:Model", "arguments": {"dim": 16}, "shape": (16, 4, 4), "paths": ("Own",), "output": 1}
    return Repository(url="https://example.org/Own", **known | options)


def test_a_model_travels_the_whole_road(clones):
    road = Road(repository(bare=("pack",), stubs=("framework",)), clones)
    row = road.travel("minmax8", False)
    assert (row["error"], row["reached"]) == (None, "run fused")
    assert row["stubbed"] == ["framework", "framework.parts"]
    assert row["quantized"] == row["equal_linears"] == 4 and row["products"] == 6
    products = {"in_proj": 16 * 64, "x_proj": 32 * 9, "dt_proj": 32, "out_proj": 32 * 16}
    done, left = 16 * sum(products.values()), 16 * 16 + 16 * 3
    assert row["multiply_adds"] == done + left
    assert row["multiply_adds_quantized"] == pytest.approx(done / (done + left), abs=1e-4)
    assert [place["weight"] for place in row["unquantized"]] == ["model.gate.weight", "model.head.weight"]
    assert row["fused"] > 0 and max(row["capture_difference"], row["fused_difference"]) < 0.1


def test_a_row_tells_where_the_road_ended_and_why_in_one_line(clones):
    row = Road(repository(), clones).travel("minmax8", False)
    assert (row["reached"], row["error"]) == (None, "build: RuntimeError: a package of two lines")


def test_a_clone_that_is_not_there_is_named(tmp_path):
    row = authors.run("vim", argparse.Namespace(clones=tmp_path))
    assert row["error"] == "no clone: git clone https://github.com/hustvl/Vim"
    assert authors.summary(row, "compile")["reached"] is None


def test_every_repository_has_all_that_it_names():
    for name, each in REPOSITORIES.items():
        module, _, attribute = each.model.partition(":")
        assert name.islower() and module and attribute and all(path.startswith(each.clone) for path in each.paths)


def test_stubs_decorate_and_make_nothing():
    registry = authors_stubs.Anything()

    @registry.register_module(force=True)
    def kept():
        return 1

    assert kept() == 1 and authors_stubs.noise(2, (3,), 1).equal(authors_stubs.noise(2, (3,), 1))
    assert torch.equal(authors_stubs.OneOutput(torch.nn.Identity(), 0)(torch.ones(1, 2)), torch.ones(2))
