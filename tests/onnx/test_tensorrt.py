"""The file for TensorRT: what its documentation asks for, checked on the file alone, and its numbers in ONNX Runtime.

It was never run in TensorRT. The rules are those of docs.nvidia.com ("Working with Quantized Types", "Explicit
Quantization") and of onnx-tensorrt's table of operators at TensorRT 10.15, which reads opsets 9 to 24:

- quantization is symmetric: int8 with zero point 0, activations by one scale, weights by one for each output channel;
- int8 and INT4 tensors are made by QuantizeLinear, or constants, and read by DequantizeLinear alone;
- INT4 is for weights alone, whose products are in floating point, so that 4 bits beside int8 activations are int8;
- loops are Loop or Scan; axes of reductions, squeezes and slices, and paddings' axes, are constants.
"""

import itertools

import pytest
import torch
from helpers.portable_models import quantized_model
from helpers.public_models import NANO

from ptq4vm import QuantConfig
from ptq4vm.metadata import metadata_of
from ptq4vm.onnx import export

onnx = pytest.importorskip("onnx")
onnx_files = pytest.importorskip("helpers.onnx_files", exc_type=ImportError)

NAMES = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu
Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout
Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity If
InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop MatMul Max
MaxPool Mean Min Mish Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceL1
ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
Reshape Resize Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
READ = set(NAMES.split())
"""Operators that TensorRT reads, but for recurrent and random ones."""

AXES = {"Squeeze": 1, "Unsqueeze": 1, "Slice": 3, "Pad": 3} | {name: 1 for name in READ if name.startswith("Reduce")}
"""The input that holds axes, which is a constant."""

CONFIGS = {
    "static": QuantConfig(range_search="minmax"),
    "one scale": QuantConfig.minmax(8),
    "4 bits, rotated": QuantConfig(range_search="minmax", rotation=True, weights={"bits": 4}, activations={"bits": 4}),
    "dynamic": QuantConfig(range_search="minmax", activations={"granularity": "per_token_dynamic"}),
    "states": QuantConfig(range_search="minmax", state={"bits": 8}),
    "outputs": QuantConfig(range_search="minmax", outputs={"bits": 8}),
}
MODELS = (*NANO, "mamba vision")
FAST = ((NANO[0], "static"),)
CASES = [
    *(("raw", config) for config in CONFIGS if config != "states"),
    *FAST,
    *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(MODELS, CONFIGS) if case not in FAST),
]


class File:
    """An ONNX file with its constants and the types of its values."""

    def __init__(self, path):
        self.graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph
        self.nodes = list(self.graph.node)
        bodies = [each.g for node in self.nodes for each in node.attribute if each.type == onnx.AttributeProto.GRAPH]
        self.everywhere = [*self.nodes, *(node for body in bodies for node in body.node)]
        tensors = [*self.graph.initializer, *(each for body in bodies for each in body.initializer)]
        self.constants = {each.name: each for each in tensors}
        self.types = {each.name: each.data_type for each in tensors}
        values = [*self.graph.value_info, *self.graph.input, *self.graph.output]
        self.types |= {each.name: each.type.tensor_type.elem_type for each in values}

    def readers(self, name):
        return [node for node in self.everywhere if name in node.input]

    def array(self, name):
        return onnx.numpy_helper.to_array(self.constants[name])


def check(file, linears):
    assert {node.op_type for node in file.everywhere} - READ == set()
    assert {node.domain for node in file.everywhere} == {""}
    for node in file.everywhere:
        place = AXES.get(node.op_type)
        if place is not None and len(node.input) > place and node.input[place]:
            assert node.input[place] in file.constants, node
    small = {name for name, dtype in file.types.items() if onnx.TensorProto.DataType.Name(dtype) in ("INT8", "INT4")}
    around = [node for node in file.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {len(node.input) for node in around} == {3}
    zeros = {node.input[2] for node in around}
    assert {onnx.TensorProto.DataType.Name(file.types[name]) for name in zeros} == {"INT8"}
    assert not any(file.array(name).any() for name in zeros)
    assert "UINT8" not in {onnx.TensorProto.DataType.Name(dtype) for dtype in file.types.values()}
    for name in small - zeros:
        assert {node.op_type for node in file.readers(name)} == {"DequantizeLinear"}, name
    made = {output: node for node in file.nodes for output in node.output}
    for node in made.values():
        if node.op_type == "QuantizeLinear":
            (reader,) = file.readers(node.output[0])
            assert file.array(node.input[1]).size == 1 and reader.input[1] == node.input[1]
    products = {node.name: node for node in file.nodes if node.op_type == "MatMul" and node.name in linears}
    assert set(products) == set(linears)
    for node in products.values():
        weight = made[node.input[1]]
        codes, scales = (file.array(name) for name in weight.input[:2])
        assert weight.op_type == "DequantizeLinear" and codes.dtype.name == "int8" and codes.ndim == 2
        assert [each.i for each in weight.attribute if each.name == "axis"] == [1] and scales.shape == codes.shape[1:]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_a_file_keeps_the_rules_and_computes_what_the_graph_does(name, config, tmp_path):
    """A code on a border may become its neighbour."""
    quantized, (images,) = quantized_model(name, CONFIGS[config])
    path = export(quantized, tmp_path / "model.onnx", "tensorrt")
    check(File(path), {linear.name for linear in metadata_of(quantized).linears})
    session = onnx_files.session(path, optimize=False)
    for batch in (images, images[:1]):
        with torch.no_grad():
            ours = quantized(batch).numpy()
        (theirs,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert theirs.shape == ours.shape and abs(theirs - ours).max() <= 0.02 * abs(ours).max()


@pytest.mark.parametrize("runtime", ["portable", "onnxruntime"])
def test_files_of_other_runtimes_break_the_rules(runtime, tmp_path):
    quantized, _ = quantized_model("raw", CONFIGS["static"])
    with pytest.raises(AssertionError):
        check(File(export(quantized, tmp_path / "model.onnx", runtime)), set())
