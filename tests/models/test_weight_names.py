import argparse
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.weights import Tiny, filled, prefixed, read_checkpoint, same, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ptq4vm.models.checkpoints import load_checkpoint, open_checkpoint
from ptq4vm.models.weight_names import CONTAINERS, EMA_CONTAINERS


class Single(nn.Module):
    """Model whose own names share a first part."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tiny()


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
    """The model's weights are found whatever wrapped the model, in any order, and whatever lies beside it."""
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
