"""Our model in the place of its authors': found by its tensors, decided by its outputs."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from golden.fill import make_input
from helpers.public_models import NANO, create, filled
from torch import nn

import ptq4vm
from ptq4vm import QuantConfig
from ptq4vm.metadata import metadata_of
from ptq4vm.models import local_vim
from ptq4vm.models.registry import ENTRIES
from ptq4vm.models.replace import replacement

CONFIG = QuantConfig(range_search=False, learning=None)
IMAGES = torch.from_numpy(make_input(2, 32, 32))


class Theirs(nn.Module):
    """Stands for the authors' code: a class of its own with all tensors of one of our models."""

    def __init__(self, model: nn.Module, returns=lambda logits: logits) -> None:
        super().__init__()
        self.written, self.returns = (model,), returns
        self._modules.update(model._modules)
        self._parameters.update(model._parameters)

    def forward(self, x):
        return self.returns(self.written[0](x))


class Linear2d(nn.Linear):
    """A linear whose weight (N, C, 1, 1) is a convolution's, as in VMamba's code for maps with channels first."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight = nn.Parameter(linear.weight.detach()[:, :, None, None])
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.flatten(1), self.bias)


def theirs(name: str, **options) -> Theirs:
    return Theirs(filled(create(name, **options)))


def lines(caplog) -> list[str]:
    """Returns what the log says of replaced models."""
    return [record.getMessage() for record in caplog.records if record.name == "ptq4vm.models.replace"]


@pytest.mark.parametrize("name", NANO)
def test_our_model_is_prepared_in_the_place_of_theirs(name, caplog):
    model = theirs(name, num_classes=7).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    prepared = ptq4vm.prepare(model, (IMAGES,), CONFIG, replace=True)
    assert torch.equal(torch.get_rng_state(), random)
    [line] = lines(caplog)
    assert f"replaced Theirs by ptq4vm's {name} with num_classes=7" in line
    metadata = metadata_of(prepared)
    assert metadata.architecture["name"] == name and metadata.architecture["arguments"] == {"num_classes": 7}
    own = metadata_of(ptq4vm.prepare(model.written[0], (IMAGES,), CONFIG))
    assert metadata.linears == own.linears and metadata.architecture == own.architecture
    assert model.training and all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(prepared(IMAGES), model.eval()(IMAGES))


def test_a_model_in_training_is_compared_in_evaluation():
    model = theirs("vmamba_nano_32", drop_path_rate=0.9).train()
    assert metadata_of(ptq4vm.prepare(model, (IMAGES,), CONFIG, replace=True)).architecture["name"] == "vmamba_nano_32"
    assert all(module.training for module in model.modules())


def test_nothing_is_replaced_unless_asked(caplog):
    assert metadata_of(ptq4vm.prepare(theirs("vim_nano_patch4_32", depth=1), (IMAGES,), CONFIG)).architecture is None
    assert not lines(caplog)


def test_the_line_is_seen_by_those_who_set_up_no_log():
    assert logging.getLogger("ptq4vm.models.replace").getEffectiveLevel() <= logging.WARNING


def test_all_in_one_call_replaces_too():
    quantized = ptq4vm.quantize(theirs("vmamba_nano_32"), [IMAGES], CONFIG, progress=False, replace=True)
    assert metadata_of(quantized).architecture["name"] == "vmamba_nano_32"


@pytest.mark.parametrize("images", [1, 5])
def test_images_of_another_number_of_channels_and_size(images):
    model = theirs("local_vim_nano_patch4_32", in_chans=1, img_size=48)
    found = replacement(model.eval(), (torch.randn(images, 1, 48, 48),))
    assert found.model_args == {"in_chans": 1, "img_size": 48}


def test_convolutions_weights_are_linears():
    model = theirs("vmamba_nano_32")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "head":
                setattr(module, name, Linear2d(child))
    found = replacement(model, (IMAGES,))
    assert found.layers[0].blocks[0].op.in_proj.weight.dim() == 2 and torch.equal(found(IMAGES), model(IMAGES))


def test_stacked_weights_may_be_those_of_grouped_linears():
    class Grouped(Theirs):
        def state_dict(self, *args, **kwargs):
            ends = {".x_proj_weight": ".x_proj.weight", ".dt_projs_weight": ".dt_projs.weight"}
            state = super().state_dict(*args, **kwargs)
            for old, new in ends.items():
                for name in [name for name in state if name.endswith(old)]:
                    state[name.removesuffix(old) + new] = state.pop(name).flatten(0, 1)
            return state

    model = Grouped(filled(create("vmamba_nano_32")))
    assert "layers.0.blocks.0.op.x_proj.weight" in model.state_dict()
    assert torch.equal(replacement(model, (IMAGES,))(IMAGES), model(IMAGES))


def test_a_backbone_is_replaced_by_a_backbone():
    model = theirs("vmamba_nano_32", features_only=True)
    found = replacement(model, (IMAGES,))
    assert [tuple(value.shape) for value in found(IMAGES)] == [tuple(value.shape) for value in model(IMAGES)]


def test_a_wrapper_of_theirs_is_looked_through():
    model = nn.DataParallel(theirs("vim_nano_patch4_32")).eval()
    assert torch.equal(replacement(model, (IMAGES,))(IMAGES), model(IMAGES))


def test_what_stands_beside_a_backbone_is_not_dropped():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.neck = theirs("vim_nano_patch4_32"), nn.Linear(10, 10)

        def forward(self, x):
            return self.neck(self.backbone(x))

    with pytest.raises(ValueError, match="Beside: none of ptq4vm has its tensors"):
        replacement(Beside().eval(), (IMAGES,))


@pytest.fixture
def twin(monkeypatch):
    """Another model whose tensors are those of `local_vim_nano_patch4_32`, and whose scans go other ways."""
    entry = ENTRIES["local_vim_nano_patch4_32"]
    arguments = {**entry.arguments, "directions": tuple(reversed(local_vim.NANO))}
    monkeypatch.setitem(ENTRIES, "a_twin", dataclasses.replace(entry, name="a_twin", arguments=arguments))
    return "a_twin"


def test_outputs_decide_between_models_of_the_same_tensors(twin):
    for name in ("local_vim_nano_patch4_32", twin):
        model = Theirs(filled(ENTRIES[name].create()))
        found = replacement(model, (IMAGES,))
        assert found.pretrained_cfg["architecture"] == name and torch.equal(found(IMAGES), model(IMAGES))


def test_models_that_the_example_cannot_tell_apart_are_named(twin, monkeypatch):
    monkeypatch.setattr("ptq4vm.models.replace.TOLERANCE", 1e9)
    with pytest.raises(ValueError, match=r"cannot tell models apart \(.*local_vim_nano_patch4_32: .*; leave out"):
        replacement(theirs("local_vim_nano_patch4_32"), (IMAGES,))


def test_our_own_model_stays_as_it_is(caplog):
    for model in (create("vim_nano_patch4_32"), create("vmamba_nano_32", features_only=True)):
        assert replacement(model, (IMAGES,)) is model
    assert not lines(caplog)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "of Sequential: none of ptq4vm has its tensors, nor similar ones"),
        (
            lambda: Theirs(filled(create("vim_nano_patch4_32", depth=2))),
            r"its tensors; the closest is vim_nano_patch4_32: missing: layers\.2\..* \(\d+ in all\)",
        ),
        (
            lambda: Theirs(filled(create("vim_nano_patch4_32")), lambda logits: 1.01 * logits),
            r"every tensor fits, but outputs .* \(vim_nano_patch4_32: [1-9]e-0[12] deviations\)",
        ),
        (lambda: Theirs(filled(create("vim_nano_patch4_32")), lambda logits: {"logits": logits}), "differ .*: inf"),
        (lambda: Theirs(filled(create("vim_nano_patch4_32")), lambda logits: logits[:, :5]), "differ .*: inf"),
        (lambda: Theirs(filled(create("vim_nano_patch4_32")), lambda logits: 0 * logits), "constant"),
        (lambda: Theirs(filled(create("vim_nano_patch4_32")), lambda logits: logits / 0), "not finite"),
        (lambda: Theirs(filled(create("vim_nano_patch4_32")), lambda logits: logits.argmax(1)), "no numbers"),
        (lambda: Theirs(filled(create("vim_nano_patch4_32")).bfloat16()), r"torch\.bfloat16 \(see model\.float\(\)\)"),
    ],
)
def test_a_model_that_none_of_ours_computes_is_refused(model, message):
    with pytest.raises(ValueError, match=rf"{message}.*leave out replace=True"):
        ptq4vm.prepare(model(), (IMAGES,), CONFIG, replace=True)
