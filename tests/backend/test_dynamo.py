"""`torch.compile(model, backend="ptq4vm")`, and packages for processes that have the native library alone."""

import gc
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map_only

import ptq4vm
from ptq4vm import convert, ops
from ptq4vm.backend import aot, dynamo, native
from ptq4vm.config import QuantConfig
from ptq4vm.graph.insert import attribute

FAST = {"inductor": False}


@pytest.fixture(scope="module")
def quantized(roads):
    return convert(roads.calibrated(QuantConfig(weights={"bits": 4}, activations={"bits": 4})))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(ours, theirs):
    """A code that moves by one at a rounding tie moves all that follows a little."""
    return float((ours - theirs).norm() / theirs.norm()) <= 0.02


@pytest.mark.parametrize(
    "options", [FAST, pytest.param({}, marks=pytest.mark.slow)], ids=["fused alone", "with Inductor"]
)
def test_one_compilation_of_the_whole_graph_runs_any_batch(quantized, images, options):
    compiled = torch.compile(quantized, backend="ptq4vm", fullgraph=True, options=options)
    with torch.inference_mode():
        for count in (1, 8, 32, 3):
            batch = images.repeat(3, 1, 1, 1)[:count]
            assert close(compiled(batch), quantized(batch))


def test_bfloat16_activations_are_an_option(quantized, images):
    half = {"activations": torch.bfloat16}
    compiled = torch.compile(quantized, backend="ptq4vm", fullgraph=True, options=FAST | half)
    with torch.inference_mode():
        assert close(compiled(images), ptq4vm.fuse(quantized, **half)(images))


def test_the_exchange_form_is_lowered(roads, images):
    prepared = roads.calibrated(QuantConfig.w8a8())
    compiled = torch.compile(convert(prepared, lower=False), backend="ptq4vm", fullgraph=True, options=FAST)
    with torch.inference_mode():
        assert close(compiled(images), convert(prepared)(images))


def test_what_is_compiled_is_fused(quantized, images, monkeypatch):
    seen = []
    share = dynamo._share_constants
    monkeypatch.setattr(dynamo, "_share_constants", lambda gm, origin: seen.append(gm) or share(gm, origin))
    torch.compile(quantized, backend="ptq4vm", options=FAST)(images)
    (gm,) = seen
    targets = {str(node.target) for node in gm.graph.nodes if node.op == "call_function"}
    assert "ptq4vm.directional_scan_quantize.default" in targets and "ptq4vm.linear.default" not in targets


def test_a_quantized_model_inside_another_one(quantized, images):
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = quantized

        def forward(self, x):
            return torch.relu(2 * self.inner(x + 1))

    model = Doubled()
    compiled = torch.compile(model, backend="ptq4vm", fullgraph=True, options=FAST)
    with torch.inference_mode():
        assert close(compiled(images), model(images))


def test_a_model_without_integers_is_left_to_inductor():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 4)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, backend="ptq4vm", options=FAST)(x), model(x))


def test_compilations_of_one_model_share_their_weights(quantized, images, monkeypatch):
    kept = []
    monkeypatch.setattr(
        dynamo, "_share_constants", lambda *a, f=dynamo._share_constants: kept.append(f(*a)) or kept[-1]
    )
    compiled = torch.compile(quantized, backend="ptq4vm", options=FAST)
    with torch.inference_mode():
        compiled(images[:1])
        compiled(images[:4])
    one, many = (dict(gm.named_buffers()) for gm in kept)
    packed = [name for name in one if name.endswith("_packed")]
    assert packed and all(one[name] is many[name] for name in packed)
    del kept[:], one, many, compiled
    torch._dynamo.reset()
    gc.collect()


def test_weights_are_shared_on_one_device_alone():
    """Tensors of two devices cannot even be compared."""
    devices, kept = ("cpu", "meta", "cpu"), []
    for device in devices:
        gm = torch.fx.GraphModule({}, torch.fx.Graph())
        gm.register_buffer("weight", torch.ones(3, device=device))
        kept.append(dynamo._share_constants(gm, frozenset({1})).get_buffer("weight"))
    assert tuple(value.device.type for value in kept) == devices and kept[2] is kept[0]


def test_a_model_on_a_gpu_is_compiled_without_asking_it(quantized, images, monkeypatch):
    """On the second of two GPUs, which are not here: its graph is Dynamo's, its tensors have no numbers."""
    there = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was started"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (8, 6))[device.index])
    monkeypatch.setattr(native, "supports", lambda device: True)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda x: id(x), raising=False)
    seen, outputs = [], []
    monkeypatch.setattr(
        dynamo, "_share_constants", lambda *a, f=dynamo._share_constants: seen.append(f(*a)) or seen[-1]
    )

    def moved(gm, example_inputs):
        """Compiles the graph as Dynamo would have made it there, and runs the one that is here."""
        graph, values = torch.fx.Graph(), {}
        graph.output(graph.graph_copy(gm.graph, values))
        mode = next(node for node in graph.nodes if node.op == "placeholder").meta["example_value"].fake_mode
        monkeypatch.setattr(mode, "allow_non_fake_inputs", True)  # constants that fusing adds

        def move(x):
            with mode:
                return x.to(there)

        for node in graph.nodes:
            node.meta["example_value"] = tree_map_only(torch.Tensor, move, node.meta.get("example_value"))
            if (argument := node.meta.get("grapharg")) is not None:
                value = node.meta["example_value"]
                node.meta["grapharg"] = SimpleNamespace(example=value, source=argument.source)
        inputs = [node.meta["example_value"] for node in graph.nodes if node.op == "placeholder"]
        compiled = dynamo.ptq4vm_backend(torch.fx.GraphModule(gm, graph), inputs, options=FAST)
        with mode:
            outputs.extend(compiled(*inputs))
        return gm.forward

    with torch.inference_mode():
        torch.compile(quantized, backend=moved, fullgraph=True)(images)
    (gm,) = seen
    assert {value.device for value in (*gm.state_dict().values(), *outputs)} == {there}
    linears = [node for node in gm.graph.nodes if node.target is ops.linear_packed.default]
    layouts = [[attribute(gm, node.args[i].target).dim() for i in (3, 5)] for node in linears]
    assert layouts and all(weight == scale + 1 for weight, scale in layouts)  # in rows, not in the CPU's tiles


def test_a_wrong_resolution_is_named(quantized):
    compiled = torch.compile(quantized, backend="ptq4vm", options=FAST)
    with pytest.raises(Exception, match="resolution"):
        compiled(torch.randn(2, 3, 20, 20))


@pytest.mark.slow
def test_the_backend_is_found_without_an_import():
    code = (
        "import sys, torch\n"
        "assert 'ptq4vm' in torch.compiler.list_backends() and 'ptq4vm' not in sys.modules\n"
        "f = torch.compile(lambda x: (x + 1).relu(), backend='ptq4vm', options={'inductor': False})\n"
        "print(f(torch.ones(2)).tolist(), 'ptq4vm.backend' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[2.0, 2.0] True", done.stderr


def test_a_fused_model_runs_and_is_not_saved(quantized, images, tmp_path):
    fused = ptq4vm.fuse(quantized)
    with torch.inference_mode():
        assert close(fused(images), quantized(images))
    with pytest.raises(ValueError, match=r"save the one that ptq4vm\.fuse was given"):
        ptq4vm.save(fused, tmp_path / "fused")


def test_only_lowered_models_are_fused(roads):
    with pytest.raises(ValueError, match="lower=False"):
        ptq4vm.fuse(convert(roads.calibrated(QuantConfig.w8a8()), lower=False))


@pytest.mark.slow
@pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
def test_a_package_runs_where_only_the_native_library_is(quantized, images, tmp_path):
    package = aot.package(quantized, tmp_path / "vim.pt2")
    with torch.inference_mode():
        torch.save((images, quantized(images)), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        f"torch.ops.load_library({str(native.LIBRARY)!r})\n"
        f"run = torch._inductor.aoti_load_package({str(package)!r})\n"
        "images, logits = torch.load('expected.pt', weights_only=True)\n"
        "for count in (1, 7, 12):\n"
        "    wrong = (run(images[:count]) - logits[:count]).norm() / logits[:count].norm()\n"
        "    assert wrong <= 0.02, wrong\n"
        "print('ptq4vm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=dict(os.environ)
    )
    assert done.stdout.strip() == "False", done.stderr
