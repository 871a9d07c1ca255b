import argparse
import math
import os
import pickle
import re
import sys
import tempfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.public_models import create
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from ptq4vm.models.checkpoints import CONTAINERS, EMA_CONTAINERS, load_checkpoint, open_checkpoint, read_checkpoint


class Tiny(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)  # buffers too, one of them a scalar
        self.head = nn.Linear(4, classes)


class Renamed(Tiny):
    def checkpoint_filter(self, state):
        return {name.replace("classifier.", "head."): tensor for name, tensor in state.items()}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in Tiny().state_dict().items()}
    return {name: torch.randint(-9, 9, shape, generator=generator).float() for name, shape in shapes.items()}


class Single(nn.Module):
    """Its own names share a first part."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tiny()


def filled() -> Tiny:
    model = Tiny()
    model.load_state_dict(weights(7))
    return model


def zeros(name: str, **options) -> dict[str, torch.Tensor]:
    """Tensors of a public model that take no space in a file."""
    with torch.device("meta"):
        state = create(name, **options).state_dict()
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}


def prefixed(prefix: str, state: dict) -> OrderedDict:
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def foreign(monkeypatch, path: str, base: type = object) -> type:
    """A class of a package that is installed where the file is written, not where it is read."""
    module, _, name = path.rpartition(".")
    for depth in range(1, module.count(".") + 2):
        package = ".".join(module.split(".")[:depth])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    cls = type(name, (base,), {"__module__": module})
    setattr(sys.modules[module], name, cls)
    return cls


def save_without_package(monkeypatch, content, path: Path) -> None:
    torch.save(content, path)
    monkeypatch.undo()


class Attack:
    """Runs a command when a trusting reader unpickles it."""

    def __init__(self, command: str, call=os.system) -> None:
        self.command, self.call = command, call

    def __reduce__(self):
        return self.call, (self.command,)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


NAMED = [*CONTAINERS, *EMA_CONTAINERS, "state_dict.model", "ema.module", "params.net.module", "unheard_of"]


@pytest.mark.parametrize("container", NAMED)
def test_weights_are_found_in_every_container(path, container):
    content = weights()
    for name in reversed(container.split(".")):
        content = {"epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}, name: content}
    torch.save(content, path)
    assert same(read_checkpoint(path), weights()) and open_checkpoint(path).container == container


def test_an_averaged_model_is_read_without_its_counter(path):
    torch.save(torch.optim.swa_utils.AveragedModel(filled()).state_dict(), path)
    assert same(read_checkpoint(path), dict(filled().state_dict()))
    assert open_checkpoint(path).notes == ()


PARTS = st.lists(st.sampled_from(["module", "model", "net", "_orig_mod", "student", "wrapped"]), max_size=4)
SIBLINGS = st.sets(st.sampled_from(["n_averaged", "criterion.weight", "teacher.head", "step", "head_of.loss.weight"]))


@given(PARTS, SIBLINGS, st.booleans(), st.booleans(), st.sampled_from([None, "state_dict", "module"]))
def test_a_prefix_of_any_kind_is_found_and_said(parts, siblings, inside, single, container):
    """Whatever wrapped the model, in any order, and whatever lies beside it: the weights are those of the model."""
    model = Single() if single else Tiny()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    prefix = "".join(f"{part}." for part in parts)
    names = {name: name.replace("norm.", "norm._orig_mod.") if inside else name for name in state}
    content = {prefix + names[name]: tensor for name, tensor in state.items()}
    content |= {name: torch.zeros(2) for name in siblings} if set(parts) - {"module", "_orig_mod"} else {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(content if container is None else {container: content}, file)
        found = load_checkpoint(model, file)
    assert same(dict(model.state_dict()), state)
    kept = [part for part in parts if part != "_orig_mod"]
    while kept and kept[0] == "module":
        del kept[0]
    assert found.prefix == "".join(f"{part}." for part in kept)
    assert all(repr(found.prefix) in note for note in found.notes if note.startswith("names"))
    assert bool(found.prefix) == any(note.startswith("names") for note in found.notes)


@pytest.mark.parametrize("ema", [False, True])
def test_weights_under_two_prefixes_are_told_apart_by_averaging_or_refused(path, ema):
    torch.save({"state_dict": prefixed("model.", weights(0)) | prefixed("model_ema.", weights(1))}, path)
    if not ema:
        model = Tiny()
        load_checkpoint(model, path)
        assert torch.equal(model.head.weight, weights(0)["head.weight"])
    torch.save(prefixed("student.", weights(0)) | prefixed("teacher.", weights(1)), path)
    with pytest.raises(ValueError, match=r"there twice, under the prefixes 'student\.', 'teacher\.'"):
        load_checkpoint(Tiny(), path)


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


def test_an_archive_that_claims_more_than_it_has_is_not_unpacked(path):
    torch.save(weights(), path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content if "/data/" not in name else bytes(10_000_000))
    with pytest.raises(ValueError, match=r"weights\.pth: .* which the file does not have"):
        read_checkpoint(path)


def test_names_are_told_without_what_a_terminal_acts_on(path):
    torch.save({**weights(), "\x1b[31mred\n\udcff": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"unexpected: \\x1b\[31mred\\n\\udcff"):
        load_checkpoint(Tiny(), path)


def test_safetensors_are_known_by_their_content(tmp_path):
    save_file(weights(), tmp_path / "weights.bin")
    assert same(read_checkpoint(tmp_path / "weights.bin"), weights())


def test_a_bare_state_dict_is_its_own_container(path):
    torch.save(weights(), path)
    assert same(read_checkpoint(path), weights())


@pytest.mark.parametrize("averaged", ["model_ema", "ema_model", "state_dict_ema"])
def test_averaged_weights_are_taken_when_asked_for(path, averaged):
    torch.save({averaged: weights(1), "model": weights(0)}, path)
    assert same(read_checkpoint(path), weights(0))
    assert same(read_checkpoint(path, ema=True), weights(1))


def test_where_the_weights_were_is_told(path):
    torch.save({"epoch": 1, "ema_model": weights(1), "state_dict_ema": weights(2), "model": weights(0)}, path)
    for ema, container in ((False, "model"), (True, "ema_model")):
        found = open_checkpoint(path, ema=ema)
        assert found.container == container and found.averaged == ("ema_model", "state_dict_ema")
        assert same(found.weights, read_checkpoint(path, ema=ema)) and not found.left_out
    torch.save(prefixed("module.backbone.", weights()) | {"module.neck.bias": torch.ones(1)}, path)
    found = open_checkpoint(path)
    assert found.container is None and found.averaged == () and found.left_out == ("module.neck.bias",)


@pytest.mark.parametrize("content", [weights(), {"model": weights()}])
def test_asking_for_averaged_weights_that_are_not_there_is_an_error(path, content):
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"no averaged weights.*without ema"):
        read_checkpoint(path, ema=True)


PREFIXES = [
    "module.",
    "module.module.",
    "_orig_mod.",
    "module._orig_mod.",
    "module.backbone.",
    "unheard_of.",
    "my.own.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_wrapped_the_model_leaves_no_trace(path, prefix):
    torch.save({"state_dict": prefixed(prefix, weights())}, path)
    assert same(read_checkpoint(path), weights())


def test_of_a_detector_only_the_backbone_is_kept(path):
    rest = {"neck.convs.0.weight": torch.ones(1), "roi_head.fc.bias": torch.ones(1)}
    torch.save({"state_dict": rest | prefixed("backbone.", weights()), "meta": {"epoch": 12}}, path)
    assert same(read_checkpoint(path), weights())


def test_a_name_that_two_prefixes_lead_to_is_an_error(path):
    torch.save(weights() | prefixed("module.", weights()), path)
    with pytest.raises(ValueError, match=r"there twice.*head\.bias"):
        read_checkpoint(path)


def test_safetensors(tmp_path):
    save_file(prefixed("module.", weights()), tmp_path / "weights.safetensors")
    assert same(read_checkpoint(tmp_path / "weights.safetensors"), weights())


@pytest.mark.parametrize("zipped", [True, False])
def test_arguments_of_the_training_script_do_not_matter(path, zipped):
    args = argparse.Namespace(lr=1e-3, nested=argparse.Namespace(depth=24), output=Path("out"), layers=[2, 2])
    torch.save({"model": weights(), "args": args}, path, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(path), weights())


def test_a_yacs_config_is_read_without_yacs(monkeypatch, path):
    CfgNode = foreign(monkeypatch, "yacs.config.CfgNode", dict)
    config = CfgNode(MODEL=CfgNode(TYPE="vssm", DEPTHS=[2, 2, 8, 2]))
    config.__dict__["__immutable__"] = True
    save_without_package(monkeypatch, {"model": weights(), "config": config, "model_ema": weights(1)}, path)
    assert "yacs" not in sys.modules
    assert same(read_checkpoint(path), weights())


def test_the_message_hub_of_mmengine_is_read_without_mmengine(monkeypatch, path):
    HistoryBuffer = foreign(monkeypatch, "mmengine.logging.history_buffer.HistoryBuffer")
    HistoryBuffer.mean = lambda self: 0
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = HistoryBuffer.__module__
    buffer = HistoryBuffer()
    buffer.__dict__ |= {"_log_history": np.ones(3), "_statistics_methods": {"mean": HistoryBuffer.mean}}
    content = {"state_dict": weights(), "message_hub": {"log_scalars": OrderedDict(loss=buffer)}}
    save_without_package(monkeypatch, content, path)
    assert same(read_checkpoint(path), weights())


def test_numpy_scalars_and_arrays_do_not_matter(path):
    meters = {"best": np.float64(76.1), "epochs": np.int64(300), "losses": np.arange(3.0)}
    torch.save({"model": weights(), **meters}, path)
    assert same(read_checkpoint(path), weights())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [os.system, eval, exec, getattr], ids=lambda call: call.__name__)
def test_a_pickle_that_calls_something_is_refused_and_not_run(path, tmp_path, call, zipped):
    victim = tmp_path / "victim"
    command = f"touch {victim}" if call is os.system else f"open({str(victim)!r}, 'w')"
    content = {"model": weights(), "args": Attack(command, call)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if call is getattr:  # a stand-in takes the call
        assert same(read_checkpoint(path), weights())
    else:
        with pytest.raises(ValueError, match=rf"{call.__name__}, which could run any code.*as safetensors"):
            read_checkpoint(path)
    assert not victim.exists()


def test_a_refusal_names_every_class_and_the_file(monkeypatch, path):
    A, B = foreign(monkeypatch, "alpha.meters.Meter"), foreign(monkeypatch, "beta.Config")
    save_without_package(monkeypatch, {"model": weights(), "a": A(), "b": B()}, path)
    with pytest.raises(ValueError, match=r"weights\.pth.*alpha\.meters\.Meter, beta\.Config"):
        read_checkpoint(path)


def test_a_whole_pickled_model_is_refused(path):
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(path)


def test_reading_leaves_the_allowances_of_the_process_as_they_were(path):
    torch.save({"model": weights(), "args": argparse.Namespace()}, path)
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(path, share, zipped):
    torch.save({"model": weights()}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"weights\.pth: truncated, or not a checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>",
        b"version https://git-lfs",
        b"cos\n",
        bytes(99),
        pickle.dumps([1], protocol=2),
    ],
    ids=["html", "lfs", "global", "zeros", "pickle"],
)
def test_what_is_not_a_checkpoint_is_named(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth: "):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"no header", b"\xff" * 64])
def test_what_is_not_safetensors_is_named(tmp_path, content):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors: truncated, or not a safetensors file"):
        read_checkpoint(file)


def test_a_missing_file_is_named(tmp_path):
    for absent in (tmp_path / "none.pth", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
            read_checkpoint(absent)


@pytest.mark.parametrize("content", [{"epoch": 3, "log": {}}, {}, [torch.ones(2)], torch.ones(2)])
def test_a_file_without_weights_says_what_it_holds(path, content):
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"no weights under|not weights by name"):
        read_checkpoint(path)


@pytest.mark.parametrize("entry", [{"step": 3}, {7: torch.ones(1)}, {"args": argparse.Namespace()}])
def test_entries_that_are_not_tensors_are_named(path, entry):
    torch.save({"model": weights() | entry}, path)
    with pytest.raises(ValueError, match=rf"not tensors: {next(iter(entry))}"):
        read_checkpoint(path)


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
