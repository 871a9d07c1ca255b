import math
import re

import pytest
import torch
from helpers.public_models import create
from helpers.weights import Tiny, filled, prefixed, same, weights
from torch import nn

from ptq4vm.models.checkpoints import load_checkpoint


class Renamed(Tiny):
    def checkpoint_filter(self, state):
        return {name.replace("classifier.", "head."): tensor for name, tensor in state.items()}


def zeros(name: str, **options) -> dict[str, torch.Tensor]:
    """Returns tensors of a public model's shapes that take no space in a file."""
    with torch.device("meta"):
        state = create(name, **options).state_dict()
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}


ODD = {
    "sparse": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.reshape(len(x), -1).to_sparse_csr(),
    "complex64": lambda x: x.to(torch.complex64),
    "int64": lambda x: x.long(),
    "int8": lambda x: x.to(torch.int8),
    "bool": lambda x: x > 0,
    "float8_e4m3fn": lambda x: x.to(torch.float8_e4m3fn),
    "NaN": lambda x: torch.full_like(x, math.nan),
    "infinity": lambda x: torch.full_like(x, -math.inf),
    "infinite in float32": lambda x: torch.full_like(x, 1e300, dtype=torch.float64),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "on the device meta": lambda x: x.to("meta"),
    "overlap in memory": lambda x: torch.zeros(x.numel()).as_strided(x.shape, [1] * x.ndim),
}

# one axis cannot overlap
NAMED_ODD = [("head.weight", kind) for kind in ODD] + [("norm.weight", kind) for kind in ODD if "overlap" not in kind]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("name", "kind"), NAMED_ODD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_odd_tensor_is_named_and_nothing_is_loaded(path, name, kind, strict):
    torch.save({"state_dict": {**weights(), name: ODD[kind](weights()[name])}}, path)
    model = filled()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"weights\.pth: {re.escape(name)} .*{re.escape(kind)}") as error:
        load_checkpoint(model, path, strict=strict)
    assert same(dict(model.state_dict()), before) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [2.5, 1e30, math.nan])
def test_a_counter_takes_whole_numbers_alone(path, value):
    torch.save({**weights(), "norm.num_batches_tracked": torch.tensor(value)}, path)
    with pytest.raises(ValueError, match=r"norm\.num_batches_tracked holds values that are no int64"):
        load_checkpoint(Tiny(), path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_model_keeps_its_dtypes(path, dtype):
    torch.save({name: value.to(dtype) for name, value in weights().items()}, path)
    model = Tiny().half()
    load_checkpoint(model, path)
    assert torch.equal(model.head.weight, weights()["head.weight"].half())
    assert model.norm.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_module_that_fails_while_it_is_filled_leaves_the_others_as_they_were(path, error):
    torch.save(weights(), path)
    model = filled()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*args):
        raise error

    model.head.register_load_state_dict_pre_hook(fail)
    with pytest.raises(ValueError if isinstance(error, RuntimeError) else KeyboardInterrupt):
        load_checkpoint(model, path)
    assert same(dict(model.state_dict()), before)


def test_a_model_without_values_is_refused(path):
    torch.save(weights(), path)
    with torch.device("meta"), pytest.raises(ValueError, match=r"the model is on the meta device.*to_empty"):
        load_checkpoint(Tiny(), path)


def test_names_are_told_without_what_a_terminal_acts_on(path):
    torch.save({**weights(), "\x1b[31mred\n\udcff": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"unexpected: \\x1b\[31mred\\n\\udcff"):
        load_checkpoint(Tiny(), path)


def test_a_model_is_filled_with_what_the_file_holds(path):
    torch.save({"model": weights()}, path)
    model = Tiny()
    load_checkpoint(model, path)
    assert all(torch.equal(tensor.float(), weights()[name]) for name, tensor in model.state_dict().items())


def test_a_model_translates_the_names_itself(path):
    torch.save({name.replace("head.", "classifier."): tensor for name, tensor in weights().items()}, path)
    model = Renamed()
    load_checkpoint(model, path)
    assert torch.equal(model.head.weight, weights()["head.weight"])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("classes", [3, 5])
def test_a_model_that_does_not_fit_is_left_as_it_was(path, strict, classes):
    state = weights() | {"extra.weight": torch.ones(1)}
    del state["norm.weight"]
    torch.save(state, path)
    model = Tiny(classes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if strict or classes == 5:
        with pytest.raises(ValueError, match="does not fit Tiny") as error:
            load_checkpoint(model, path, strict=strict)
        assert "missing: norm.weight" in str(error.value)
        assert "unexpected: extra.weight" in str(error.value)
        assert ("wrong shape: head.weight (file (3, 4), model (5, 4))" in str(error.value)) == (classes == 5)
        assert same(dict(model.state_dict()), before)
    else:
        load_checkpoint(model, path, strict=False)
        assert torch.equal(model.head.weight, state["head.weight"])
        assert torch.equal(model.norm.weight, before["norm.weight"])


def test_a_file_of_another_model_is_refused_even_when_not_strict(path):
    torch.save({f"layers.{i}": torch.ones(1) for i in range(20)}, path)
    with pytest.raises(ValueError, match=r"unexpected: (layers\.\d, ){8}… \(20 in all\)"):
        load_checkpoint(Tiny(), path, strict=False)


@pytest.mark.parametrize(
    ("file", "options", "way_out"),
    [
        ("vim_nano_patch4_32", {"num_classes": 7}, ": it fits vim_nano_patch4_32 with num_classes=7\n"),
        ("vmamba_small_s2l15", {}, ": it fits vmamba_small_s2l15\n"),
        ("local_vim_small", {}, ": it fits local_vim_small or local_vim_small_searched\n"),
        ("vmamba_nano_32", {"depths": (1, 2, 2)}, "of all models vmamba_nano_32 is the closest to the file"),
        ("deit_tiny_patch16_224", {}, "same name, number of classes and image size\\?\n"),
    ],
)
def test_a_file_of_another_model_is_told(path, file, options, way_out):
    torch.save(zeros(file, **options), path)
    with pytest.raises(ValueError, match=rf"(?i)does not fit Vim.*{way_out}"):
        load_checkpoint(create("vim_nano_patch4_32"), path)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_backbone_is_filled_from_a_detector_as_from_old_names(path, prefix):
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in backbone().state_dict().items()}
    old = {name.replace(".op.", ".self_attention."): tensor for name, tensor in state.items()}
    old = {name: tensor[..., None, None] if "fc1.weight" in name else tensor for name, tensor in old.items()}
    torch.save({"state_dict": prefixed(prefix, old)}, path)
    model = backbone()
    load_checkpoint(model, path)
    assert same(model.state_dict(), state)


def test_a_classifier_fills_a_backbone_when_not_strict(path):
    classifier = create("vmamba_nano_32").state_dict()
    torch.save({"model": classifier}, path)
    model = backbone()
    with pytest.raises(ValueError, match=r"for a classifier \(vmamba_nano_32\); strict=False loads it"):
        load_checkpoint(model, path)
    load_checkpoint(model, path, strict=False)
    assert all(torch.equal(tensor, classifier.get(name, tensor)) for name, tensor in model.state_dict().items())
    assert torch.equal(model.outnorm0.weight, torch.ones(24))


def backbone() -> nn.Module:
    return create("vmamba_nano_32", features_only=True)
