"""Rivals: what others make of the network, and PyTorch itself; `ptq4vm benchmark --against` finds them by name here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ptq4vm.onnx
from benchmarks.speed.torch_ops import LOOP, replace_ops
from ptq4vm.backend import native
from ptq4vm.benchmark.kinds import KINDS, Builder, Call, Network, called
from ptq4vm.graph.capture import capture
from ptq4vm.graph.insert import aten
from ptq4vm.onnx.export import onnx_model
from ptq4vm.onnx.library import library
from ptq4vm.optional_packages import require

CALIBRATION = 4
"""Batches of noise that torchao calibrates on: its scales decide nothing about time."""


@dataclass(frozen=True, slots=True)
class Rival:
    build: Builder
    extra: str = ""
    """The extra of ptq4vm that installs `packages`."""
    packages: tuple[str, ...] = ()
    check: Callable[[], object] | None = None
    """Raises ImportError where something else is missing."""


def builder(name: str) -> Builder:
    """Raises ValueError for an unknown name, and ImportError where the packages that it needs are not installed."""
    if name not in RIVALS:
        raise ValueError(f"{name!r} is no way to run a model; there are {', '.join((*KINDS, *RIVALS))}")
    rival = RIVALS[name]
    require(name, rival.extra, *rival.packages)
    if rival.check is not None:
        rival.check()
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


def _onnxruntime_int8(network: Network, images: Tensor) -> Call:
    """ONNX Runtime with our file for it: exact integer products, the scan in stock operators."""
    return onnxruntime_call(exported(network, "onnxruntime"))


def _onnxruntime_custom(network: Network, images: Tensor) -> Call:
    """ONNX Runtime with our fused operators, from the library that `ptq4vm.onnx.library()` names."""
    return onnxruntime_call(exported(network, "custom"), library())


def _onnxruntime_fp32(network: Network, images: Tensor) -> Call:
    """ONNX Runtime with the network in floating point, the scan in the same stock operators."""
    return onnxruntime_call(_float_file(network, images))


def _openvino_int8(network: Network, images: Tensor) -> Call:
    """OpenVINO with our portable file: its int8 for every quantized linear, the scan in stock operators."""
    return openvino_call(exported(network, "portable"), images)


def _openvino_fp32(network: Network, images: Tensor) -> Call:
    """OpenVINO with the network in floating point, the scan in the same stock operators."""
    return openvino_call(_float_file(network, images), images)


def exported(network: Network, runtime: str) -> Path:
    """Returns the quantized model's file for a runtime, which is written once for all batch sizes."""
    path = network.folder / f"{runtime}.onnx"
    return path if path.exists() else ptq4vm.onnx.export(network.quantized, path, runtime)


def onnxruntime_call(path: Path, library: Path | None = None) -> Call:
    """Runs a file in ONNX Runtime on torch's number of threads; to fix the batch made nothing faster there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    if native.isa() not in ("vnni", "amx"):  # its faster products overflow there
        options.add_session_config_entry("session.x64quantprecision", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino_call(path: Path, images: Tensor) -> Call:
    """Runs a file in OpenVINO, for this batch size and torch's number of threads."""
    import openvino

    model = openvino.Core().read_model(path)
    model.reshape(list(images.shape))
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # where a CPU has bfloat16, its default computes in that
    }
    compiled = openvino.compile_model(model, "CPU", options)
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0])


def _compiled(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> Call:
    """Inductor with frozen weights, which gained 2 % in bfloat16; `cpp_wrapper` gained nothing."""
    compiled = torch.compile(model, dynamic=False)
    with torch._inductor.config.patch(freezing=True):
        return called(lambda images: compiled(images.to(dtype)), images)


def _float_file(network: Network, images: Tensor) -> Path:
    import onnx_ir as ir

    path = network.folder / "float.onnx"
    if not path.exists():
        ir.save(onnx_model(capture(network.model, (images,)), "portable"), path)
    return path


def _noise(images: Tensor) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(1)
    return (torch.randn(images.shape, generator=random) for _ in range(CALIBRATION))


ONNX = ("onnx", "onnxscript")

RIVALS = {
    "eager-loop": Rival(_loop),
    "compiled-fp32": Rival(_compiled_fp32),
    "compiled-bf16": Rival(_compiled_bf16),
    "torchao-int8": Rival(_torchao),
    "onnxruntime-fp32": Rival(_onnxruntime_fp32, "onnx", (*ONNX, "onnxruntime")),
    "onnxruntime-int8": Rival(_onnxruntime_int8, "onnx", (*ONNX, "onnxruntime")),
    "onnxruntime-custom": Rival(_onnxruntime_custom, "onnx", (*ONNX, "onnxruntime"), library),
    "openvino-fp32": Rival(_openvino_fp32, "openvino", (*ONNX, "openvino")),
    "openvino-int8": Rival(_openvino_int8, "openvino", (*ONNX, "openvino")),
}
