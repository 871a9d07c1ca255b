"""ONNX files of whole models: what they compute, what they say of themselves, and what is refused."""

import json
import sys

import pytest
import torch
from helpers.portable_models import made, quantized_model
from helpers.public_models import NANO
from torch.utils._pytree import tree_leaves

import ptq4vm
from ptq4vm import QuantConfig
from ptq4vm.cli import export as command
from ptq4vm.onnx.export import RUNTIMES, export
from ptq4vm.onnx.library import LIBRARY

onnx_files = pytest.importorskip("helpers.onnx_files", exc_type=ImportError)
onnx = pytest.importorskip("onnx")

SMALL = (("words", "onnxruntime"), ("pair", "portable"), ("by hand", "onnxruntime"))
DEEP = ("constants", "picture", "raw", "deit", "swin", "mamba vision", *NANO)
WITH_CLASS_TOKEN = ("vim_nano_patch4_32",)
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="no library of operators is built")
STOCK = ("portable", "onnxruntime")
CONFIGS = {
    "8 bits": QuantConfig(range_search="minmax"),
    "6 bits": QuantConfig.minmax(6),
    "4 bits, rotated": QuantConfig(range_search="minmax", rotation=True, weights={"bits": 4}, activations={"bits": 4}),
    "dynamic": QuantConfig(range_search="minmax", activations={"granularity": "per_token_dynamic"}),
    "states": QuantConfig(range_search="minmax", state=ptq4vm.StateQuantization()),
    "outputs": QuantConfig(range_search="minmax", outputs=ptq4vm.OutputQuantization()),
    "class token": QuantConfig(range_search="minmax", class_token_in_float=True),
    "pooled": QuantConfig(range_search="minmax", pooled=True),
}


@pytest.fixture(scope="module")
def words():
    return quantized_model("words")[0]


@pytest.fixture(scope="module")
def files(words, tmp_path_factory):
    """A file of one model for every runtime."""
    folder = tmp_path_factory.mktemp("onnx")
    return {runtime: export(words, folder / f"{runtime}.onnx", runtime) for runtime in RUNTIMES}


def _batches(inputs, images):
    return tuple(torch.cat([x] * 2)[:images] if isinstance(x, torch.Tensor) else x for x in inputs)


def _check(quantized, inputs, path, runtime, bound):
    """One file computes what the graph does, for one, three and eight images."""
    library = ptq4vm.onnx.library() if runtime == "custom" else None
    session = onnx_files.session(export(quantized, path, runtime), library=library)
    graph = ptq4vm.fuse(quantized) if runtime == "custom" else quantized
    for images in (1, 3, 8):
        batch = _batches(inputs, images)
        with torch.no_grad():
            ours = tree_leaves(graph(*batch))
        names = [node.name for node in quantized.graph.find_nodes(op="placeholder")]
        feeds = {name: x.numpy() for name, x in zip(names, batch, strict=True)}
        theirs = session.run(None, feeds)
        assert len(theirs) == len(ours)
        for a, b in zip(theirs, ours, strict=True):
            assert a.shape == tuple(b.shape) and a.dtype == b.numpy().dtype
            assert abs(a - b.numpy()).max() <= bound * max(1.0, abs(b.numpy()).max())


@pytest.mark.parametrize(("name", "runtime"), SMALL)
def test_models_of_any_inputs_and_outputs(name, runtime, tmp_path):
    _check(*quantized_model(name), tmp_path / "model.onnx", runtime, 1e-6)


@needs_library
@pytest.mark.parametrize("name", ["by hand"])
def test_fused_models_with_the_library(name, tmp_path):
    _check(*quantized_model(name), tmp_path / "model.onnx", "custom", 1e-6)


@pytest.mark.parametrize("runtime", ["portable", pytest.param("custom", marks=needs_library)])
def test_weights_of_integers_that_are_read_in_floating_point(runtime, tmp_path):
    """Those of convolutions, where results are quantized; our library has no operator for them."""
    _check(*quantized_model("picture", CONFIGS["outputs"]), tmp_path / "model.onnx", runtime, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", DEEP)
def test_every_family(name, runtime, tmp_path):
    """A code at a border may become its neighbour, which at 4 bits is seen; nothing else may."""
    if runtime == "tensorrt":
        pytest.skip("written for another runtime")
    _check(*quantized_model(name), tmp_path / "model.onnx", runtime, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", STOCK)
@pytest.mark.parametrize(
    ("name", "config"),
    [(name, config) for name in NANO for config in CONFIGS if config != "class token" or name in WITH_CLASS_TOKEN],
)
def test_every_way_to_quantize(name, config, runtime, tmp_path):
    quantized, inputs = quantized_model(name, CONFIGS[config])
    _check(quantized, inputs, tmp_path / "model.onnx", runtime, 0.02)
    saved = ptq4vm.save(quantized, tmp_path / "saved") / "model.safetensors"
    assert (tmp_path / "model.onnx").stat().st_size <= 1.2 * saved.stat().st_size


@pytest.mark.parametrize("runtime", ["portable", "custom"])
def test_the_same_model_gives_the_same_bytes(words, files, tmp_path, runtime):
    assert export(words, tmp_path / "again.onnx", runtime).read_bytes() == files[runtime].read_bytes()


def test_a_file_says_nothing_of_where_it_was_made(files):
    for path in files.values():
        data = path.read_bytes()
        assert str(path.parent).encode() not in data and b".py" not in data and b"torch" not in data


def test_a_file_is_a_valid_one_with_a_dynamic_batch(files):
    for runtime in STOCK:
        model = onnx.load(files[runtime])
        onnx.checker.check_model(model, full_check=True)
        (inputs,), (outputs,) = model.graph.input, model.graph.output
        assert (inputs.name, outputs.name) == ("words", "output")
        assert [axis.dim_param or axis.dim_value for axis in inputs.type.tensor_type.shape.dim] == ["batch", 5]
        assert [axis.dim_param or axis.dim_value for axis in outputs.type.tensor_type.shape.dim] == ["batch", 3]
        assert {each.domain: each.version for each in model.opset_import} == {"": 21}


def test_a_file_knows_how_images_become_its_input(tmp_path):
    from ptq4vm.models import create_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("vim_nano_patch4_32", depth=1).eval()
        quantized = ptq4vm.quantize(model, [torch.randn(2, 3, 32, 32)], QuantConfig.minmax(8), progress=False)
    made = onnx.load(export(quantized, tmp_path / "model.onnx"))
    properties = {each.key: each.value for each in made.metadata_props}
    assert properties["ptq4vm.architecture"] == "vim_nano_patch4_32"
    assert json.loads(properties["ptq4vm.preprocessing"])["input_size"] == [3, 32, 32]
    assert json.loads(properties["ptq4vm.classes"]) == list("0123456789")
    assert made.producer_name == "ptq4vm" and made.producer_version == ptq4vm.__version__


def test_products_have_the_names_of_their_linears(words, files):
    model = onnx.load(files["onnxruntime"])
    names = [node.name for node in model.graph.node if node.op_type == "MatMulInteger"]
    assert names == [linear.name for linear in ptq4vm.metadata.metadata_of(words).linears]


@pytest.mark.parametrize("runtime", [runtime for runtime in RUNTIMES if runtime != "custom"])
def test_uses_of_one_weight_have_names_of_their_own(tmp_path, runtime):
    """ONNX Runtime refuses a file in which two nodes have one name."""

    class Twice(torch.nn.Linear):
        def forward(self, x):
            return super().forward(super().forward(x).tanh())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantized = ptq4vm.quantize(Twice(8, 8), [torch.randn(2, 5, 8)], QuantConfig.minmax(8), progress=False)
    path = export(quantized, tmp_path / "model.onnx", runtime)
    nodes = onnx.load(path).graph.node
    names = [node.name for node in nodes if node.op_type in ("MatMul", "MatMulInteger")]
    assert names == [linear.name for linear in ptq4vm.metadata.metadata_of(quantized).linears] and len(names) == 2
    onnx_files.session(path)


def test_an_operator_without_translation_is_named(tmp_path):
    class Model(torch.nn.Linear):
        def forward(self, x):
            return torch.lgamma(super().forward(x).abs() + 1)

    quantized = ptq4vm.quantize(Model(8, 8), [torch.randn(2, 5, 8)], QuantConfig.minmax(8), progress=False)
    with pytest.raises(ValueError, match=r"no translation of \S*lgamma\S*, an operator of the model"):
        export(quantized, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("runtime", "name", "message"),
    [
        ("tensorflow", "model.onnx", "'portable', 'onnxruntime', 'tensorrt', 'custom', got 'tensorflow'"),
        ("portable", "model.pb", r"model\.pb: the name of an ONNX file ends in \.onnx"),
    ],
)
def test_bad_arguments_are_told_before_the_work(words, tmp_path, runtime, name, message):
    with pytest.raises(ValueError, match=message):
        export(words, tmp_path / name, runtime)


def test_only_lowered_graphs_are_exported(words, tmp_path):
    with pytest.raises(ValueError, match=r"export the one that ptq4vm\.fuse was given"):
        export(ptq4vm.fuse(words), tmp_path / "model.onnx")
    model, inputs = made("raw")
    prepared = ptq4vm.calibrate(ptq4vm.prepare(model, inputs, QuantConfig.minmax(8)), [inputs], progress=False)
    with pytest.raises(ValueError, match="without lower=False"):
        export(ptq4vm.convert(prepared, lower=False), tmp_path / "model.onnx")
    with pytest.raises(TypeError, match=r"ptq4vm\.convert"):
        export(torch.fx.symbolic_trace(model), tmp_path / "model.onnx")


def test_without_onnx_the_extra_is_named(words, tmp_path, monkeypatch):
    monkeypatch.setattr("ptq4vm.optional_packages.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ptq4vm\[onnx\]'"):
        export(words, tmp_path / "model.onnx")


def test_the_command_offers_the_runtimes_that_there_are():
    assert command.RUNTIMES == RUNTIMES


@pytest.mark.slow
def test_importing_imports_no_runtime():
    code = "import sys, ptq4vm.onnx; assert not {'onnx', 'onnx_ir', 'onnxruntime', 'openvino'} & set(sys.modules)"
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True)
