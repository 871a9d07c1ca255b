"""Where the class token is, seen from every linear."""

import pytest
import timm
import torch
from helpers.graphs import canonical
from helpers.strategies import normal
from torch import nn
from torch.fx import Interpreter

from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.graph.class_token import class_tokens
from ptq4vm.graph.sites import find_linears
from ptq4vm.models import LocalVim, Vim
from ptq4vm.passes.quantized_nodes import quantized_linears

KEPT = QuantConfig.minmax(8, class_token_in_float=True)


class Inputs(Interpreter):
    """Keeps every value."""

    def __init__(self, module):
        super().__init__(module)
        self.seen = {}

    def run_node(self, node):
        self.seen[node.name] = super().run_node(node)
        return self.seen[node.name]


MODELS = {
    "vim": lambda: Vim(img_size=12, patch_size=4, embed_dim=16, depth=2, state=2, num_classes=4),
    "local_vim": lambda: LocalVim(12, 4, 3, 4, 16, [["h", "v_flip", "w2"]] * 2, state=2, class_token=True),
}


@pytest.mark.parametrize("name", ["vim", pytest.param("local_vim", marks=pytest.mark.slow)])
def test_it_is_what_the_parameter_changes_in_the_first_block(name):
    """Nine patches, so that in the reversed branch it is not in the same place."""
    torch.manual_seed(0)
    gm = canonical(MODELS[name]().eval(), torch.randn(2, 3, 12, 12))
    linears = find_linears(gm)
    found = class_tokens(gm, list(linears))
    assert len(found) == len(linears) - sum(site.name == "head" for site in linears.values())
    x, runs = torch.randn(2, 3, 12, 12), []
    for shift in (0.0, 1.0):
        with torch.no_grad():
            gm.get_parameter("cls_token").add_(shift)
            run = Inputs(gm)
            run.run(x)
            runs.append(run.seen)
    first = next(iter(linears))
    before, after = (seen[first.args[0].name] for seen in runs)
    assert (before != after).any(-1).any(0).nonzero().flatten().tolist() == [found[first]]


def test_the_reversed_branch_has_it_in_another_place():
    gm = canonical(MODELS["vim"]().eval(), torch.randn(2, 3, 12, 12))
    linears = find_linears(gm)
    found = {linears[node].name: index for node, index in class_tokens(gm, list(linears)).items()}
    assert {found["layers.1.mixer.x_proj"], found["layers.1.mixer.in_proj"], found["layers.1.mixer.out_proj"]} == {4}
    assert {found["layers.1.mixer.x_proj_b"], found["layers.1.mixer.dt_proj_b"]} == {5}


def test_a_model_without_one_is_refused():
    model = timm.create_model("vmamba_nano_32", num_classes=10).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    with pytest.raises(ValueError, match="class_token_in_float is for models with a class token"):
        prepare(model, (x,), KEPT)


@pytest.mark.parametrize(
    "config", [KEPT, QuantConfig(range_search=False, class_token_in_float=True)], ids=["minmax", "pts"]
)
def test_its_row_stays_as_it_is_and_the_others_are_quantized(roads, images, config):
    gm = roads.calibrated(config)
    for linear in quantized_linears(gm):
        assert linear.input.float_token_index == 8
        x = torch.randn(
            2, 17, len(linear.smooth) if linear.smooth is not None else linear.node.args[1].meta["val"].shape[1]
        )
        y = linear.input(x)
        assert torch.equal(y[:, 8], x[:, 8])
        assert (y != x).any(-1).sum(1).tolist() == [16, 16]
    with torch.no_grad():
        wanted = gm(images)
        assert torch.equal(convert(gm, lower=False)(images), wanted)
        lowered = convert(gm)
        assert (lowered(images) - wanted).abs().max() <= 0.02 * wanted.abs().max()


class Joined(nn.Module):
    """Tokens, a class token much larger than they, and more tokens."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 1, 8), 1000.0))
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(torch.cat((x[:, :3], self.token.expand(x.shape[0], -1, -1), x[:, 3:]), 1))


def test_a_large_class_token_does_not_stretch_the_range():
    x = normal(4, 5, 8)
    steps = []
    for config in (KEPT, QuantConfig.minmax(8)):
        gm = calibrate(prepare(Joined(), (x,), config), [x], progress=False)
        (linear,) = quantized_linears(gm)
        steps.append(float(linear.input.scale))
    assert steps[0] < steps[1] / 100
