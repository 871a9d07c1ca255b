"""ONNX Runtime's custom operators return the bytes of torch's, and say of bad calls what those say."""

import concurrent.futures
import ctypes
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.bad_calls import bad_call, valid_calls
from helpers.draws import available, directional_inputs, draw, linear_inputs, scan_inputs
from helpers.onnx_operators import (
    FED,
    ONLY_TORCH,
    OnnxOperators,
    assert_same,
    is_representable,
    model,
    run,
    session,
)
from helpers.operator_laws import LAWS, name_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4vm import ops
from ptq4vm.onnx import library
from ptq4vm.onnx.library import LIBRARY

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="ptq4vm was installed without the library")

KERNELS = {name: law for name, law in LAWS.items() if not law.operators & ONLY_TORCH}


def test_every_operator_of_fused_graphs_has_a_law_here():
    assert set().union(*(law.operators for law in KERNELS.values())) == set(map(name_of, ops.SCHEMAS)) - ONLY_TORCH


@pytest.mark.parametrize("name", KERNELS)
@given(st.data(), st.sampled_from([*FED]), st.sampled_from([1, 2]))
@settings(max_examples=12)
def test_results_are_those_of_torch(name, data, fed, threads):
    """Optional inputs are there or not, weights of 4 and 8 bits, directions stacked, floats of every type."""
    KERNELS[name].check(OnnxOperators(FED[fed], threads), **data.draw(KERNELS[name].arguments()))


def large_calls(images: int) -> dict[str, tuple]:
    """Calls whose work is worth several threads."""
    random = draw(images)
    rank = dict(K=2, shared=False, images=images, tokens=197, channels=96, rank=12, states=16, optional=True, bits=4)
    directional = directional_inputs(random, **rank, padding=0, dtype=torch.bfloat16)
    x = torch.randn(images, 197, 192, generator=random)
    qparams = (torch.rand(197, generator=random) * 20, torch.zeros(197, dtype=torch.int32), None, 8)
    linear = linear_inputs(None, images, 197, 192, 192, 4, "token", True, random)
    return {
        "selective_scan": (*scan_inputs(images, 197, 192, 16, True, random), True),
        "directional_scan": (*directional, False, 0.5),
        "norm_quantize": (x, x, torch.rand(192, generator=random), None, 1e-5, True, True, *qparams),
        "linear_packed": (*linear, torch.float32),
        "linear_gelu_quantize": (*linear, True, *qparams),
    }


@pytest.mark.parametrize("images", [1, 3, 8])
@pytest.mark.parametrize("name", large_calls(0))
def test_threads_of_the_runtime_change_no_byte(name, images):
    call = large_calls(images)[name]
    for threads in (1, 2):
        getattr(OnnxOperators(FED["the first"], threads), name)(*call)


def test_threads_may_run_one_session():
    calls = [large_calls(images)["linear_packed"] for images in (1, 2, 3)]
    loaded = session(model("linear_packed", calls[0], FED["the first"])[0], threads=2)
    feeds = [{"x": call[0].numpy()} for call in calls]
    wanted = [torch.ops.ptq4vm.linear_packed(call[0], *calls[0][1:]) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for have, want in zip(pool.map(lambda fed: run(loaded, fed), feeds * 10), wanted * 10, strict=True):
            assert_same(have, want)


def test_a_result_that_nobody_reads_is_left_out():
    call = large_calls(1)["norm_quantize"]
    serialized, feeds = model("norm_quantize", call, result0="")
    assert_same(run(session(serialized), feeds), torch.ops.ptq4vm.norm_quantize(*call)[1:])


# --- what is wrong is said ---


def test_bad_calls_are_told_as_in_torch():
    """Or are none. That x is of a type that no kernel has, the runtime says itself."""
    calls = {name: of for name, of in valid_calls(3).items() if name not in ONLY_TORCH}
    told = 0
    for number in range(250):
        name, values, _ = bad_call(calls, 3, number)
        if not is_representable(name, values):
            continue
        values = [value.resolve_neg() if isinstance(value, torch.Tensor) else value for value in values]
        try:
            want = getattr(torch.ops.ptq4vm, name)(*values)
        except RuntimeError as error:
            with pytest.raises(
                Exception, match=f"{re.escape(str(error))}|Type 'tensor.*' of input parameter .* is invalid"
            ):
                serialized, feeds = model(name, values)
                run(session(serialized), feeds)
            told += 1
        else:
            serialized, feeds = model(name, values)
            assert_same(run(session(serialized), feeds), want)
    assert told > 50


def test_a_session_lives_on_after_an_error():
    x, *rest = large_calls(1)["linear_packed"]
    serialized, _ = model("linear_packed", (x, *rest), FED["the first"])
    loaded = session(serialized)
    for _ in range(3):
        with pytest.raises(Exception, match=r"ptq4vm::linear_packed: a weight of 192 × 128 channels is packed into"):
            run(loaded, {"x": x[..., 64:].contiguous().numpy()})
        assert_same(run(loaded, {"x": x.numpy()}), torch.ops.ptq4vm.linear_packed(x, *rest))


def test_a_missing_attribute_is_named():
    import onnx

    serialized, _ = model("quantize", (torch.ones(2, 3), torch.ones(1), torch.zeros(1, dtype=torch.int32), None, 8))
    loaded = onnx.load_from_string(serialized)
    del loaded.graph.node[0].attribute[:]
    with pytest.raises(Exception, match=r"ptq4vm::quantize: .*bits"):
        session(loaded.SerializeToString())


@pytest.mark.parametrize("name", sorted(ONLY_TORCH))
def test_gradients_are_not_in_the_library(name):
    from onnx import helper

    node = helper.make_node(name, ["x"], ["y"], domain="ptq4vm")
    inputs = [helper.make_tensor_value_info("x", 1, [1])]
    graph = helper.make_graph([node], name, inputs, [helper.make_tensor_value_info("y", 1, [1])])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ptq4vm", 1)]
    with pytest.raises(Exception, match=f"ptq4vm:{name}.* is not a registered function/op"):
        session(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def test_a_runtime_that_is_too_old_is_told():
    """A runtime of which only the first call is there, as all versions have it."""
    told = []
    make_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)

    class Base(ctypes.Structure):
        _fields_ = (("get_api", get_api), ("version", get_version))

    @make_status
    def status(code, message):
        told.append(message.decode())
        return 1

    table = (ctypes.c_void_p * 1)(ctypes.cast(status, ctypes.c_void_p))
    version = ctypes.create_string_buffer(b"1.16.3")
    base = Base(
        get_api(lambda wanted: ctypes.addressof(table) if wanted < 17 else None),
        get_version(lambda: ctypes.addressof(version)),
    )
    register = ctypes.CDLL(str(library())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert told == [
        "ptq4vm::RegisterCustomOps needs ONNX Runtime 1.17 or newer, this is 1.16.3: pip install --upgrade onnxruntime"
    ]


def test_a_package_without_the_library_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["ptq4vm.onnx.library"], "LIBRARY", tmp_path / "_onnxruntime.so")
    with pytest.raises(ImportError, match=r"installed without _onnxruntime.so: install a C\+\+ compiler"):
        library()


# --- a process without torch ---

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["ptq4vm"] = None  # neither can be imported
import numpy, onnxruntime
library, folder = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
numpy.save(f"{folder}/y.npy", session.run(["result0_float64"], dict(numpy.load(f"{folder}/fed.npz")))[0])
assert "libtorch" not in open("/proc/self/maps").read()
"""


@pytest.mark.parametrize("isa", available())
def test_every_instruction_set_runs_without_torch(isa, tmp_path):
    call = large_calls(1)["selective_scan"]
    serialized, feeds = model("selective_scan", call, FED["every other"])
    (tmp_path / "model.onnx").write_bytes(serialized)
    np.savez(tmp_path / "fed.npz", **feeds)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(library()), str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"PTQ4VM_ISA": isa}, timeout=100)
    before = torch.ops.ptq4vm._use_isa("")
    try:
        assert torch.ops.ptq4vm._use_isa(isa) == isa
        assert_same([np.load(tmp_path / "y.npy")], torch.ops.ptq4vm.selective_scan(*call))
    finally:
        torch.ops.ptq4vm._use_isa(before)


def test_the_library_asks_for_nothing_but_the_system():
    content = LIBRARY.read_bytes()
    assert b"libstdc++" in content and b"libtorch" not in content and b"libgomp" not in content
