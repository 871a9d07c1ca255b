"""Laws of a saved model: it is the function that was saved, whoever reads it."""

import copy
import io
import multiprocessing
import pickle
import re
import subprocess
import sys

import pytest
import torch
from helpers.portable_models import CONFIG, MODELS, quantized_model
from helpers.public_models import slow_but
from helpers.strategies import EVERYTHING
from safetensors.torch import load as deserialize
from torch.utils._pytree import tree_flatten, tree_leaves

from ptq4vm import QuantConfig, convert, fuse, save
from ptq4vm.graph.insert import attribute, set_tensor
from ptq4vm.metadata import metadata_of
from ptq4vm.passes.lower.fuse import fusions
from ptq4vm.serialization.model_file import dumps, loads


def equal(one, other) -> bool:
    """Whether two outputs have one structure and the same bytes."""
    (ours, spec), (theirs, wanted) = tree_flatten(one), tree_flatten(other)
    # named tuples of one name have classes of their own
    structures = {re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", str(found)) for found in (spec, wanted)}
    return len(structures) == 1 and all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(ours, theirs, strict=True)
    )


NOT_EMPTY = ("constants", "swin")
"""Models that take no empty batch in floating point either: MKL's Fourier transform, and a view with -1."""

FAST = ("words", "pair", "constants", "picture", "raw", "by hand")


@pytest.mark.parametrize("name", slow_but(FAST, MODELS))
def test_what_is_loaded_is_what_was_saved(name):
    quantized, inputs = quantized_model(name)
    data = dumps(quantized)
    loaded = loads(data)
    assert data == dumps(quantized) == dumps(loaded)
    for batch in (1, 4) if name in NOT_EMPTY else (0, 1, 4):
        some = tuple(value[:batch] for value in inputs)
        assert equal(loaded(*some), quantized(*some))
    have, want = loaded.state_dict(), quantized.state_dict()
    assert have.keys() == want.keys() and all(torch.equal(have[key], want[key]) for key in want)
    # layouts decide which kernels run, and so the last bits
    assert {key: value.stride() for key, value in have.items()} == {key: value.stride() for key, value in want.items()}
    assert metadata_of(loaded) == metadata_of(quantized)
    assert not any(value.requires_grad for value in loaded.parameters())
    assert str(loaded.graph) == str(quantized.graph)


@pytest.mark.parametrize("name", slow_but(("pair", "constants", "raw"), MODELS))
def test_a_loaded_model_is_fused_as_a_fresh_one(name):
    quantized, inputs = quantized_model(name)
    fused, again = fuse(quantized), fuse(loads(dumps(quantized)))
    assert fusions(fused) == fusions(again)
    for batch in (1, 4) if name in NOT_EMPTY else (0, 1, 4):
        some = tuple(value[:batch] for value in inputs)
        assert equal(fused(*some), again(*some))


@pytest.mark.parametrize("name", slow_but((), ("vim_nano_patch4_32", "vmamba_nano_32", "pair")))
def test_a_loaded_model_is_compiled_as_a_fresh_one(name):
    quantized, inputs = quantized_model(name)
    loaded = loads(dumps(quantized))
    compiled = [torch.compile(gm, backend="ptq4vm", options={"inductor": False}) for gm in (quantized, loaded)]
    with torch.no_grad():
        assert equal(*(run(*inputs) for run in compiled))


@pytest.mark.parametrize("recipe", slow_but(("kscaled",), ("minmax", "pts", "kscaled", "state", "smoothquant")))
def test_every_recipe_comes_back(roads, images, recipe):
    quantized = convert(roads.calibrated(QuantConfig.recipe(recipe, 8)))
    assert torch.equal(loads(dumps(quantized))(images), quantized(images))


@pytest.mark.slow
def test_every_option_at_once_comes_back(roads, images):
    quantized = convert(roads.calibrated(EVERYTHING))
    assert torch.equal(loads(dumps(quantized))(images), quantized(images))


def test_weights_lie_in_memory_as_they_lay():
    quantized, _ = quantized_model("picture")
    weight = attribute(loads(dumps(quantized)), "stem.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_tensors_in_two_places_are_stored_once_and_stay_one():
    quantized, inputs = quantized_model("raw")
    first, *others = [name for name in quantized.state_dict() if name.endswith("weight_q")]
    for other in others:
        set_tensor(quantized, other, attribute(quantized, first))
    data = dumps(quantized)
    loaded = loads(data)
    assert {attribute(loaded, name).data_ptr() for name in others} == {attribute(loaded, first).data_ptr()}
    assert list(deserialize(data)).count(first) == 1 and not set(others) & set(deserialize(data))
    assert torch.equal(loaded(*inputs), quantized(*inputs)) and dumps(loaded) == data


FRESH = """
import builtins, socket, sys, torch
real = builtins.__import__
def guarded(name, *args, **options):
    if name.split(".")[0] in ("timm", "torchao", "torchvision", "helpers", "pickle5"):
        raise AssertionError(f"imported {name}")
    return real(name, *args, **options)
builtins.__import__ = guarded
def refuse(*args, **options):
    raise AssertionError("opened a socket")
socket.socket.connect = refuse
torch.set_num_threads(int(sys.argv[1]))
import ptq4vm
for folder in sys.argv[2:]:
    inputs, outputs = torch.load(folder + "/io.pt")
    found = torch.utils._pytree.tree_leaves(ptq4vm.load(folder)(*inputs))
    print(all(torch.equal(x, y) for x, y in zip(found, outputs, strict=True)))
"""


def test_a_fresh_process_needs_neither_timm_nor_the_models_code(tmp_path):
    folders = []
    for name in FAST:
        quantized, inputs = quantized_model(name)
        folder = save(quantized, tmp_path / name.replace(" ", "_"))
        torch.save((inputs, tree_leaves(quantized(*inputs))), folder / "io.pt")
        folders.append(str(folder))
    arguments = [sys.executable, "-c", FRESH, str(torch.get_num_threads()), *folders]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True"] * len(folders), done.stderr


def test_pickle_copy_and_torch_save_bring_back_a_quantized_model(roads, images):
    quantized = convert(roads.calibrated(QuantConfig(**CONFIG)))
    exchange = convert(roads.calibrated(QuantConfig(**CONFIG)), lower=False)
    for gm in (quantized, exchange, loads(dumps(quantized))):
        buffer = io.BytesIO()
        torch.save(gm, buffer)
        buffer.seek(0)
        ways = [
            copy.copy(gm),
            copy.deepcopy(gm),
            pickle.loads(pickle.dumps(gm)),
            torch.load(buffer, weights_only=False),
        ]
        for way in ways:
            assert torch.equal(way(images), gm(images)) and metadata_of(way) == metadata_of(gm)
            assert torch.equal(pickle.loads(pickle.dumps(way))(images), gm(images))


def test_a_fused_model_is_copied_but_not_pickled(roads, images):
    fused = fuse(convert(roads.calibrated(QuantConfig(**CONFIG))))
    for way in (copy.copy(fused), copy.deepcopy(fused)):
        assert torch.equal(way(images), fused(images)) and fusions(way) == fusions(fused)
        with pytest.raises(TypeError, match=r"laid out for this machine: pickle the one that ptq4vm\.fuse was given"):
            pickle.dumps(way)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_prepared_model_is_copied_but_not_pickled(roads, images, calibrated):
    config = QuantConfig(**CONFIG)
    prepared = roads.calibrated(config) if calibrated else roads.prepared(config)
    for way in (copy.copy(prepared), copy.deepcopy(prepared)):
        assert torch.equal(way(images), prepared(images))
        with pytest.raises(TypeError, match=r"a prepared graph cannot be pickled: ptq4vm\.convert it first"):
            torch.save(way, io.BytesIO())


def _run_in_child(gm, x, queue) -> None:
    torch.set_num_threads(1)
    queue.put(gm(x).numpy().tobytes())


@pytest.mark.slow
def test_a_spawned_process_is_given_the_model(roads, images):
    quantized = convert(roads.calibrated(QuantConfig(**CONFIG)))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_run_in_child, args=(quantized, images, queue))
    child.start()
    found = queue.get(timeout=120)
    child.join()
    assert found == quantized(images).numpy().tobytes()


def test_what_is_loaded_in_inference_mode_is_ordinary():
    quantized, inputs = quantized_model("raw")
    data, outputs = dumps(quantized), quantized(*inputs)
    with torch.inference_mode():
        loaded = loads(data)
    assert not any(value.is_inference() for value in loaded.state_dict().values())
    assert torch.equal(copy.deepcopy(loaded)(*inputs), outputs)
