"""Rivals: what others make of the network, and PyTorch itself; `ptq4vm benchmark --against` finds them by name here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.torch_ops import EXPORTED, LOOP, replace_ops
from ptq4vm.benchmark.kinds import KINDS, Builder, Call, Network, called
from ptq4vm.graph.capture import capture
from ptq4vm.graph.insert import aten
from ptq4vm.optional_packages import require

CALIBRATION = 4
"""Batches of noise that others calibrate on: their scales decide nothing about time."""


@dataclass(frozen=True, slots=True)
class Rival:
    build: Builder
    extra: str = ""
    """The extra of ptq4vm that installs `packages`."""
    packages: tuple[str, ...] = ()


def builder(name: str) -> Builder:
    """Raises ValueError for an unknown name, and ImportError where the packages that it needs are not installed."""
    if name not in RIVALS:
        raise ValueError(f"{name!r} is no way to run a model; there are {', '.join((*KINDS, *RIVALS))}")
    rival = RIVALS[name]
    require(name, rival.extra, *rival.packages)
    return rival.build


def _loop(network: Network, images: Tensor) -> Call:
    """Today's way without a GPU: a Python loop over the tokens as the scan, and nn.Conv1d."""
    return replace_ops(capture(network.model, (images,)), LOOP)


def _compiled_fp32(network: Network, images: Tensor) -> Call:
    """Inductor, with our scan and convolution."""
    return _compiled(network.model, images)


def _compiled_bf16(network: Network, images: Tensor) -> Call:
    """Inductor on the model in bfloat16, with our scan and convolution: the honest baseline."""
    return _compiled(copy.deepcopy(network.model).bfloat16(), images, torch.bfloat16)


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
        return called(lambda images: compiled(images.to(dtype)), images)


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


ONNX = ("onnx", "onnxscript")

RIVALS = {
    "eager-loop": Rival(_loop),
    "compiled-fp32": Rival(_compiled_fp32),
    "compiled-bf16": Rival(_compiled_bf16),
    "torchao-int8": Rival(_torchao),
    "onnxruntime-int8": Rival(_onnxruntime, "onnx", (*ONNX, "onnxruntime")),
    "openvino-int8": Rival(_openvino, "openvino", (*ONNX, "openvino", "nncf")),
}
