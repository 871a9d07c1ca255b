"""The portable file in OpenVINO: every linear in int8, by OpenVINO's own account, and the outputs of the graph."""

import itertools

import pytest
import torch
from helpers.portable_models import quantized_model
from helpers.public_models import NANO

from ptq4vm import QuantConfig
from ptq4vm.metadata import metadata_of
from ptq4vm.onnx import export

openvino = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

CONFIGS = {
    "static": QuantConfig(range_search="minmax"),
    "4 bits of one scale": QuantConfig.minmax(4),
    "4 bits, rotated": QuantConfig(range_search="minmax", rotation=True, weights={"bits": 4}, activations={"bits": 4}),
    "dynamic": QuantConfig(range_search="minmax", activations={"granularity": "per_token_dynamic"}),
}
FAST = ((NANO[0], "static"), (NANO[0], "dynamic"), (NANO[2], "4 bits, rotated"))
CASES = [
    pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in itertools.product(NANO, CONFIGS)
]
INT8 = ("i8", "u8")


def compiled(path):
    # where a CPU has bfloat16, OpenVINO would compute in that whatever is not int8
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(str(path), "CPU", options)


def products(model):
    """The precision in which each product runs, and the names in the file of the nodes that it is made of."""
    found = []
    for node in model.get_runtime_model().get_ops():
        facts = {key: value.value for key, value in node.get_rt_info().items()}
        if facts["layerType"] in ("MatMul", "FullyConnected"):
            found.append((facts["runtimePrecision"], set(facts["originalLayersNames"].split(","))))
    return found


def check(quantized, inputs, path, bound):
    """One file, compiled once, for one, three and eight images."""
    model = compiled(export(quantized, path))
    linears = {linear.name for linear in metadata_of(quantized).linears}
    found = [precision for precision, names in products(model) if names & linears]
    assert len(found) == len(linears) and set(found) <= set(INT8)
    images = torch.cat([inputs[0]] * 2)
    for count in (1, 3, 8):
        with torch.no_grad():
            ours = quantized(images[:count]).numpy()
        theirs = model([images[:count].numpy()])[0]
        assert theirs.shape == ours.shape and abs(theirs - ours).max() <= bound * abs(ours).max()


@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_linear_runs_in_int8(name, config, tmp_path):
    """A code on a border may become its neighbour, since sums of floating point have another order there."""
    check(*quantized_model(name, CONFIGS[config]), tmp_path / "model.onnx", 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba vision", "deit", "swin"])
def test_every_linear_of_models_with_attention_runs_in_int8(name, tmp_path):
    check(*quantized_model(name, CONFIGS["static"]), tmp_path / "model.onnx", 0.02)


def test_a_linear_in_floating_point_is_noticed(tmp_path):
    """The form of integer products is the exact one of ONNX Runtime; OpenVINO computes it in floating point."""
    quantized, _ = quantized_model(NANO[0], CONFIGS["static"])
    found = products(compiled(export(quantized, tmp_path / "model.onnx", "onnxruntime")))
    assert found and not {precision for precision, _ in found} & set(INT8)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_portable_file_holds_no_signed_activations(config, tmp_path):
    """OpenVINO computes garbage from signed codes with zero point 0 and a dynamic batch; 128 of unsigned ones is 0."""
    quantized, _ = quantized_model("raw", CONFIGS[config])
    model = onnx.load(export(quantized, tmp_path / "model.onnx"))
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    made = {node.output[0]: constants[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert made and {zero.dtype.name for zero in made.values()} == {"uint8"}
    read = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in made]
    assert read and all(constants[node.input[2]].dtype.name == "uint8" for node in read)
