import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.public_models import NANO, SAMPLED, SHORT, create
from helpers.strategies import normal
from torch import nn
from torch.fx import Graph, GraphModule

from benchmarks.speed import memory, torch_ops
from benchmarks.speed.rivals import RIVALS
from ptq4vm import optional_packages, quantize
from ptq4vm.benchmark import kinds
from ptq4vm.benchmark.kinds import KINDS, Network, build, builder
from ptq4vm.benchmark.run import Plan
from ptq4vm.cli.benchmark import KINDS as SAID
from ptq4vm.config import QuantConfig
from ptq4vm.graph.capture import capture
from ptq4vm.ops import convolution_1d, scans
from ptq4vm.serialization.empty_model import empty_quantized_model

IMAGES = normal(2, 3, 32, 32, seed=0)
RUNTIMES = {
    "onnxruntime-fp32": 1e-4,
    "onnxruntime-int8": 1e-4,
    "onnxruntime-custom": 1e-2,
    "openvino-fp32": 1e-4,
    "openvino-int8": 1e-2,
}
"""The runtimes of ONNX files, and how far they may be from the graph that the file was written of.

A code that is rounded the other way is what OpenVINO's own scan and the fused operators differ by.
"""
COMPILED = {"compiled-fp32": 1e-4, "compiled-bf16": 0.03, "torchao-int8": 0.15}


def network(name, folder):
    """In floating point alone, of few blocks."""
    torch.manual_seed(0)
    model = create(name, **SHORT[name]).eval()
    return Network(model, GraphModule(nn.Module(), Graph()), folder)


def skip_without(kind):
    try:
        builder(kind)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", SAMPLED)
def test_the_loop_computes_what_the_native_scan_does(tmp_path, name):
    made = network(name, tmp_path)
    with torch.inference_mode():
        expected, found = (build(kind, made, IMAGES)(IMAGES) for kind in ("eager-fp32", "eager-loop"))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("whole", [True, False])
def test_the_plain_scan_is_the_reference(whole):
    batch, tokens, channels, states = 2, 7, 5, 3
    u, delta, z = (normal(batch, tokens, channels, seed=seed) for seed in (1, 2, 3))
    B, C = (normal(batch, tokens, states, seed=seed) for seed in (4, 5))
    A, D, bias = -normal(channels, states, seed=6).exp(), normal(channels, seed=7), normal(channels, seed=8)
    optional = (D, z, bias) if whole else (None, None, None)
    delta = delta if whole else delta.abs()
    arguments = (u, delta, A, B, C, *optional, whole)
    torch.testing.assert_close(torch_ops.loop_scan(*arguments), scans.selective_scan(*arguments), rtol=1e-4, atol=1e-5)


def test_the_plain_convolution_is_the_reference():
    x, weight, bias = normal(2, 7, 5, seed=1), normal(5, 4, seed=2), normal(5, seed=3)
    for arguments in ((x, weight, bias, True), (x, weight, None, False)):
        torch.testing.assert_close(
            torch_ops.conv1d(*arguments), convolution_1d.causal_conv1d(*arguments), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("module, wanted", [("rivals", "kind 'compiled-bf16'"), ("sections", "--memory")])
def test_outside_a_checkout_the_way_to_rivals_is_told(monkeypatch, tmp_path, module, wanted):
    monkeypatch.setattr(kinds, "CHECKOUT", tmp_path)
    monkeypatch.chdir(Path(__file__).parents[2])  # the current directory is not looked at
    with pytest.raises(ImportError, match=rf"no {wanted}.*; its repository has more: clone it and run 'pip install -e"):
        builder("compiled-bf16") if module == "rivals" else Plan(kinds=("quantized",), sections=("memory",))
    assert builder("quantized")


def test_replacing_leaves_the_graph_itself_alone():
    gm = capture(create(NANO[0], **SHORT[NANO[0]]).eval(), (IMAGES,))
    before = str(gm.graph)
    made = torch_ops.replace_ops(gm, torch_ops.LOOP)
    assert str(gm.graph) == before and not any("ptq4vm" in str(node.target) for node in made.graph.nodes)


def test_the_command_line_knows_the_kinds():
    assert SAID.replace("; in a checkout ", ", ").split(", ") == [*KINDS, *RIVALS]
    assert all(rival.build.__doc__ for rival in RIVALS.values())


def test_an_unknown_kind_is_told_which_there_are():
    with pytest.raises(
        ValueError, match=r"'tensorrt' is no way to run a model; there are quantized, .*eager-fp32, eager-loop, .*"
    ):
        builder("tensorrt")


@pytest.mark.parametrize("name", RUNTIMES)
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, tmp_path, name):
    monkeypatch.setattr(optional_packages, "find_spec", lambda package: None)
    extra = name.partition("-")[0].removesuffix("runtime")
    with pytest.raises(ImportError, match=rf"{name} needs onnx and .*: pip install 'ptq4vm\[{extra}\]'"):
        build(name, network(NANO[0], tmp_path), IMAGES)


def test_without_the_library_of_operators_the_benchmark_says_so_at_once(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(importlib.import_module("ptq4vm.onnx.library"), "LIBRARY", tmp_path / "absent.so")
    with pytest.raises(ImportError, match=r"ptq4vm was installed without absent\.so: install"):
        Plan(kinds=("fused", "onnxruntime-custom"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPILED)
def test_what_compilers_make_of_the_network_is_the_network(tmp_path, kind):
    torch._dynamo.reset()
    made = network("vmamba_nano_32", tmp_path)
    call = build(kind, made, IMAGES)
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        expected, found = made.model(IMAGES), call(IMAGES).float()
    assert (found - expected).norm() <= COMPILED[kind] * expected.norm()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network and what its kinds are measured by; files are written once for all of them."""
    model = network("vim_nano_patch4_32", None).model
    quantized = quantize(model, [IMAGES], QuantConfig(range_search="minmax"), progress=False)
    return Network(model, quantized, tmp_path_factory.mktemp("files"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_runtime_computes_what_its_file_was_written_of(saved, kind):
    skip_without(kind)
    source = saved.model if kind.endswith("fp32") else saved.quantized
    for images in (IMAGES, IMAGES[:1]):  # the second call reads the file of the first
        with torch.inference_mode():
            expected, found = source(images), build(kind, saved, images)(images)
        assert found.shape == expected.shape and (found - expected).norm() <= RUNTIMES[kind] * expected.norm()


@pytest.mark.slow
@pytest.mark.skipif("ptq4vm" not in torch._dynamo.list_backends(), reason="ptq4vm is not installed, only imported")
def test_the_backend_computes_what_the_lowered_graph_does(tmp_path):
    model = create(NANO[0]).eval()
    quantized = quantize(model, [IMAGES], QuantConfig(range_search=False), progress=False)
    made = Network(model, quantized, tmp_path)
    with torch.inference_mode():
        expected, *others = (build(kind, made, IMAGES)(IMAGES) for kind in ("quantized", "fused", "compiled"))
    assert all((found - expected).norm() <= 0.05 * expected.norm() for found in others)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")


@on_linux
def test_memory_that_is_given_back_counts():
    """16 Mi values of four bytes, held only while the call runs; what was held before is no part of it."""
    before = torch.ones(2**24)
    found = memory._growth(lambda images: torch.ones(2**24).sum(), IMAGES)
    assert found == pytest.approx(2**26, rel=0.05) and len(before)


@pytest.mark.slow
@on_linux
def test_a_fresh_process_measures_the_memory_of_a_forward(tmp_path):
    model = create(NANO[0]).eval()
    made = Network(model, empty_quantized_model(model, (IMAGES,), QuantConfig(range_search=False)), tmp_path)
    peaks = memory.measure(made, (3, 32, 32), ["quantized", "eager-fp32"], 64, 1)
    assert [(peak.name, peak.batch_size, peak.threads) for peak in peaks] == [
        ("quantized", 64, 1),
        ("eager-fp32", 64, 1),
    ]
    # at least what in_proj gives in float32 (256 channels), and far less than that of all blocks
    assert all(4 * 256 * 65 * 64 < peak.bytes < 2**27 for peak in peaks)


def test_a_process_that_fails_says_why(monkeypatch, tmp_path):
    done = subprocess.CompletedProcess([], 1, "", "Traceback\n  ...\nMemoryError: no more\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(memory, "save", lambda *_: None)
    with pytest.raises(OSError, match="memory of eager-fp32 failed: MemoryError: no more"):
        memory.measure(network(NANO[0], tmp_path), (3, 32, 32), ["eager-fp32"], 1, 1)
