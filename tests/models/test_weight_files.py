import argparse
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.weights import prefixed, read_checkpoint, same, weights
from safetensors.torch import save_file
from torch import nn


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


def test_an_archive_that_claims_more_than_it_has_is_not_unpacked(path):
    torch.save(weights(), path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content if "/data/" not in name else bytes(10_000_000))
    with pytest.raises(ValueError, match=r"weights\.pth: .* which the file does not have"):
        read_checkpoint(path)


def test_safetensors_are_known_by_their_content(tmp_path):
    save_file(weights(), tmp_path / "weights.bin")
    assert same(read_checkpoint(tmp_path / "weights.bin"), weights())


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
