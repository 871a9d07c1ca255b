"""The ways to run one network that `ptq4vm benchmark` compares: how each is made, and what it needs.

A builder is given the network and a batch of images, and returns what is called with such a batch. It is made for this
batch size and for as many threads as torch has at that moment. docs/benchmark.md says more about each.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.benchmark.plain import EXPORTED, LOOP, replace_ops
from ptq4vm.graph.capture import capture
from ptq4vm.graph.insert import aten
from ptq4vm.passes.lower.pipeline import converted_graph, fusing_pipeline

Call = Callable[[Tensor], Any]

CALIBRATION = 4
"""Batches of noise that others calibrate on: their scales decide nothing about time."""

ONNX = ("onnx", "onnxscript")


@dataclass(frozen=True, slots=True)
class Network:
    """One network in floating point and quantized, and a folder for files that builders make on the way."""

    model: nn.Module
    quantized: GraphModule
    folder: Path


@dataclass(frozen=True, slots=True)
class Kind:
    build: Callable[[Network, Tensor], Call]
    extra: str | None
    """The extra of ptq4vm that installs `packages`."""
    packages: tuple[str, ...]


KINDS: dict[str, Kind] = {}


def check_kind(name: str) -> None:
    """Raises ValueError for a kind that is none, and ImportError where what it needs is not installed."""
    if name not in KINDS:
        raise ValueError(f"{name!r} is no way to run a model; there are {', '.join(KINDS)}")
    kind = KINDS[name]
    missing = [package for package in kind.packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"{name} needs {' and '.join(missing)}: pip install 'ptq4vm[{kind.extra}]'")


def build(name: str, network: Network, images: Tensor) -> Call:
    """Raises as `check_kind` does."""
    check_kind(name)
    with _quiet(), torch.no_grad():
        return KINDS[name].build(network, images)


def _kind(name: str, extra: str | None = None, *packages: str) -> Callable[..., Any]:
    def register(builder: Callable[[Network, Tensor], Call]) -> Callable[[Network, Tensor], Call]:
        KINDS[name] = Kind(builder, extra, packages)
        return builder

    return register


@_kind("eager-fp32")
def _eager(network: Network, images: Tensor) -> Call:
    """The floating-point model as it is, with our scan and convolution."""
    return network.model


@_kind("eager-loop")
def _loop(network: Network, images: Tensor) -> Call:
    """Today's way without a GPU: a Python loop over the tokens as the scan, and nn.Conv1d."""
    return replace_ops(capture(network.model, (images,)), LOOP)


@_kind("compiled-fp32")
def _compiled_fp32(network: Network, images: Tensor) -> Call:
    """Inductor, with our scan and convolution."""
    return _compiled(network.model, images)


@_kind("compiled-bf16")
def _compiled_bf16(network: Network, images: Tensor) -> Call:
    """Inductor on the model in bfloat16, with our scan and convolution: the honest baseline."""
    return _compiled(copy.deepcopy(network.model).bfloat16(), images, torch.bfloat16)


@_kind("quantized")
def _quantized(network: Network, images: Tensor) -> Call:
    """The lowered graph, operator by operator."""
    return network.quantized


@_kind("fused")
def _fused(network: Network, images: Tensor) -> Call:
    """The lowered graph after fusion, operator by operator."""
    return converted_graph(network.quantized, fusing_pipeline())


@_kind("compiled")
def _backend(network: Network, images: Tensor) -> Call:
    """The lowered graph through our backend of torch.compile, which fuses."""
    return _through_backend(network, images, {})


@_kind("compiled-half")
def _backend_half(network: Network, images: Tensor) -> Call:
    """The same with activations between operators, and the convolutions of the stem, in bfloat16."""
    return _through_backend(network, images, {"activations": torch.bfloat16})


def _through_backend(network: Network, images: Tensor, options: dict[str, Any]) -> Call:
    if "ptq4vm" not in torch._dynamo.list_backends(exclude_tags=()):
        raise ImportError("torch.compile knows no backend 'ptq4vm': install ptq4vm again (pip install .)")
    compiled = torch.compile(network.quantized, backend="ptq4vm", dynamic=False, options=options)
    return _called(compiled, images)


@_kind("torchao-int8")
def _torchao(network: Network, images: Tensor) -> Call:
    """torchao's static int8 for x86 (PT2E) of every linear and convolution, then Inductor, with our scan."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(network.model, (images,)).module()
    for node in exported.graph.find_nodes(op="call_function", target=aten.linear.default):
        # how the quantizer finds linears; without it those of bare parameters stay in floating point
        node.meta["source_fn_stack"] = [(node.name, torch.nn.functional.linear)]
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for batch in _noise(images):
        prepared(batch)
    return _compiled(convert_pt2e(prepared), images)


@_kind("onnxruntime-int8", "onnx", *ONNX, "onnxruntime")
def _onnxruntime(network: Network, images: Tensor) -> Call:
    """Static QDQ int8 of every MatMul, Gemm and Conv outside the scan, which is an ONNX Scan in float32."""
    import onnxruntime
    from onnxruntime import quantization

    source = _onnx_file(network, images)
    path = source.with_name(f"int8-{len(images)}.onnx")
    if not path.exists():
        quantization.quantize_static(
            source,
            path,
            _reader(quantization, images),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@_kind("openvino-int8", "openvino", *ONNX, "openvino", "nncf")
def _openvino(network: Network, images: Tensor) -> Call:
    """NNCF's static int8 of the same ONNX file, where the scan is a TensorIterator in float32."""
    import nncf
    import openvino

    path = network.folder / f"openvino-{len(images)}.xml"
    if not path.exists():
        # written and read again, each loop has constants of its own, which NNCF's graph needs
        openvino.save_model(openvino.convert_model(_onnx_file(network, images)), path, compress_to_fp16=False)
        batches = nncf.Dataset([batch.numpy() for batch in _noise(images)])
        quantized = nncf.quantize(openvino.Core().read_model(path), batches, subset_size=CALIBRATION)
        openvino.save_model(quantized, path.with_name(f"openvino-int8-{len(images)}.xml"), compress_to_fp16=False)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # its default of bfloat16 was slower here
    }
    model = openvino.compile_model(path.with_name(f"openvino-int8-{len(images)}.xml"), "CPU", options)
    return lambda images: torch.from_numpy(model([images.numpy()])[0])


def _compiled(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> Call:
    """Inductor with frozen weights, which gained 2 % in bfloat16; `cpp_wrapper` gained nothing."""
    compiled = torch.compile(model, dynamic=False)
    with torch._inductor.config.patch(freezing=True):
        return _called(lambda images: compiled(images.to(dtype)), images)


def _called(call: Call, images: Tensor) -> Call:
    """Compiled now, called as it is when it is timed: else it would be compiled again, without these options."""
    with torch.inference_mode():
        call(images)
    return call


def _onnx_file(network: Network, images: Tensor) -> Path:
    path = network.folder / f"float-{len(images)}.onnx"
    if not path.exists():
        exchanged = replace_ops(capture(network.model, (images,)), EXPORTED)
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        torch.onnx.export(exchanged, (images,), path, dynamo=True, optimize=True, verbose=False, **names)
    return path


def _noise(images: Tensor) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(1)
    return (torch.randn(images.shape, generator=random) for _ in range(CALIBRATION))


def _reader(quantization: Any, images: Tensor) -> Any:
    batches = _noise(images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Compilers, exporters and quantizers have much to say that nobody who waits for a table needs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
