"""The selective scan and the causal convolution in stock ONNX operators compute what our operators do."""

import io
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from ptq4vm.onnx import stock  # noqa: E402
from ptq4vm.onnx.quantization import Form  # noqa: E402
from ptq4vm.onnx.tidy import tidy  # noqa: E402

TOKENS = (1, 2, 3, 8, 9, 23)
STATES = (1, 2, 4, 16)
BATCHES = (1, 3, 8)
CONSTANTS = ("A", "D", "delta_bias", "weight", "bias", "state_scale", "state_inv_scale")


def expanded(operator, tensors, numbers, constants=CONSTANTS):
    """Returns the file's bytes of one call, whose activations have a dynamic batch; None is an absent tensor."""
    values, given, weights = [], [], []
    for name, tensor in tensors.items():
        if tensor is None:
            values.append(None)
            continue
        dtype = ir.DataType.FLOAT16 if tensor.dtype is torch.float16 else ir.DataType.FLOAT
        if name in constants:
            array = ir.tensor(tensor.numpy())
            values.append(ir.val(name, dtype, ir.Shape(tensor.shape), const_value=array))
            weights.append(values[-1])
        else:
            shape = tensor.shape if name == "A" else ("batch", *tensor.shape[1:])
            values.append(ir.val(name, dtype, ir.Shape(shape)))
            given.append(values[-1])
    y = ir.val("y", values[0].dtype, values[0].shape)
    node = ir.Node(stock.DOMAIN, operator, values, [ir.AttrInt64(k, int(v)) for k, v in numbers.items()], outputs=[y])
    opsets = {"": 21, stock.DOMAIN: 1}
    graph = ir.Graph(given, [y], nodes=[node], initializers=weights, opset_imports=opsets, name="scan")
    model = tidy(stock.expand(ir.Model(graph, ir_version=10), Form()))
    return ir.to_proto(model).SerializeToString()


def in_onnxruntime(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda tensors: session.run(None, {name: tensors[name].numpy() for name in names})[0]


def in_openvino(model):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(io.BytesIO(model)), "CPU", settings)
    names = [each.any_name for each in compiled.inputs]
    return lambda tensors: compiled([tensors[name].numpy() for name in names])[0]


def draw(batch, tokens, channels, states, seed=0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    wide, narrow = (batch, tokens, channels), (batch, tokens, states)
    shapes = {"u": wide, "delta": wide, "A": (channels, states), "B": narrow, "C": narrow, "D": (channels,), "z": wide}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in (shapes | {"delta_bias": (channels,)}).items()}
    return tensors | {"A": -torch.exp(tensors["A"])}


def compare(run, operator, tensors, numbers, tolerance=1e-5):
    wanted = getattr(torch.ops.ptq4vm, operator)(*tensors.values(), *numbers.values()).float().numpy()
    y = run(tensors).astype(np.float32)
    assert y.shape == wanted.shape
    assert np.abs(y - wanted).max() <= tolerance * max(1e-3, np.abs(wanted).max())


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_scan_of_any_shape_and_batch(tokens, states):
    drawn = {batch: draw(batch, tokens, 5, states, seed=batch) for batch in BATCHES}
    weights = {name: drawn[1][name] for name in ("A", "D", "delta_bias")}
    run = in_onnxruntime(expanded("selective_scan", drawn[1], {"delta_softplus": True}))
    for tensors in drawn.values():
        compare(run, "selective_scan", tensors | weights, {"delta_softplus": True})


@pytest.mark.parametrize("states", (1, 4))
@pytest.mark.parametrize("absent", [c for n in range(4) for c in itertools.combinations(("D", "z", "delta_bias"), n)])
def test_what_a_scan_may_lack(absent, states):
    tensors = draw(2, 11, 6, states) | dict.fromkeys(absent)
    for softplus in (True, False):
        if not softplus:
            tensors["delta"] = tensors["delta"].abs()
        numbers = {"delta_softplus": softplus}
        compare(in_onnxruntime(expanded("selective_scan", tensors, numbers)), "selective_scan", tensors, numbers)


@pytest.mark.parametrize("states", (1, 4))
@pytest.mark.parametrize("delta", (-1e4, -30.0, 0.0, 30.0, 1e4))
def test_extreme_steps_and_inputs_of_zero(delta, states):
    tensors = draw(2, 11, 6, states)
    tensors["delta"][:, ::2] = delta
    tensors["u"][:, 3:6] = 0
    numbers = {"delta_softplus": True}
    compare(in_onnxruntime(expanded("selective_scan", tensors, numbers)), "selective_scan", tensors, numbers)


@pytest.mark.parametrize("states", (1, 4))
def test_a_is_computed_in_the_graph(states):
    tensors, numbers = draw(2, 11, 6, states), {"delta_softplus": True}
    model = expanded("selective_scan", tensors, numbers, constants=("D", "delta_bias"))
    compare(in_onnxruntime(model), "selective_scan", tensors, numbers)


@pytest.mark.parametrize("states", (1, 4))
def test_a_scan_of_half_precision_is_computed_in_float32(states):
    tensors, numbers = draw(2, 11, 6, states), {"delta_softplus": True}
    for name in ("u", "delta", "B", "C", "z"):
        tensors[name] = tensors[name].half()
    model = expanded("selective_scan", tensors, numbers)
    compare(in_onnxruntime(model), "selective_scan", tensors, numbers, tolerance=2**-11)


def quantized(tokens, states, bits, per_token):
    """Scales of state codes, powers of two: then a state is on the grid, and rounding differs at ties alone."""
    g = torch.Generator().manual_seed(7)
    scale = 2.0 ** -torch.randint(bits - 3, bits - 1, (tokens if per_token else 1,), generator=g).float()
    tensors = draw(3, tokens, 6, states) | {"state_scale": scale, "state_inv_scale": 1 / scale}
    return tensors, {"delta_softplus": True, "bits": bits}


@pytest.mark.parametrize("tokens, states", ((1, 4), (7, 1), (7, 4), (16, 16)))
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("bits", (4, 8))
def test_a_scan_with_states_of_integers(tokens, states, per_token, bits):
    """A state next to a tie may round the other way: one channel of the 18 may be off, none is here."""
    tensors, numbers = quantized(tokens, states, bits, per_token)
    arguments = tensors | {"delta_softplus": True}
    order = [*list(tensors)[:8], "delta_softplus", "state_scale", "state_inv_scale"]
    wanted = torch.ops.ptq4vm.selective_scan_quantized(*(arguments[k] for k in order), bits).numpy()
    y = in_onnxruntime(expanded("selective_scan_quantized", tensors, numbers))(tensors)
    differs = np.abs(y - wanted).max(1) > 1e-5 * np.abs(wanted).max()
    assert differs.mean() <= 0.06  # at most one of 18 channels
    assert np.isfinite(y).all()


@pytest.mark.parametrize("tokens", (1, 3, 10))
@pytest.mark.parametrize("taps", (1, 2, 4))
@pytest.mark.parametrize("silu", (True, False))
def test_a_causal_convolution(tokens, taps, silu):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((3, tokens, 6), (6, taps), (6,)))
    for each in (bias, None):
        tensors, numbers = {"x": x, "weight": weight, "bias": each}, {"silu": silu}
        compare(in_onnxruntime(expanded("causal_conv1d", tensors, numbers)), "causal_conv1d", tensors, numbers)


@pytest.mark.parametrize("tokens, states", ((1, 4), (9, 1), (17, 4)))
def test_openvino_runs_the_same_file(tokens, states):
    numbers = {"delta_softplus": True}
    run = in_openvino(expanded("selective_scan", draw(1, tokens, 5, states), numbers))
    for batch in BATCHES:
        weights = {name: draw(1, tokens, 5, states)[name] for name in ("A", "D", "delta_bias")}
        compare(run, "selective_scan", draw(batch, tokens, 5, states, batch) | weights, numbers, tolerance=1e-4)
