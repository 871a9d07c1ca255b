"""Writes a quantized model as an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from ptq4vm import __version__
from ptq4vm.files import replace_file
from ptq4vm.graph.verify import is_lowered
from ptq4vm.metadata import FUSIONS, metadata_of
from ptq4vm.optional_packages import require
from ptq4vm.passes.lower.pipeline import converted_graph, fusing_pipeline

if TYPE_CHECKING:
    import onnx_ir as ir

    from ptq4vm.onnx.quantization import Form

RUNTIMES = ("portable", "onnxruntime", "tensorrt", "custom")


def export(quantized: GraphModule, path: str | Path, runtime: str = "portable") -> Path:
    """Writes a quantized model as an ONNX file whose linears run in int8, for any batch.

    Args:
        quantized: a lowered graph, from `convert`, `quantize` or `load`.
        path: the file to write, which ends in `.onnx`.
        runtime: which runtime the file is written for.
            - "portable": Q/DQ nodes around every quantized linear, which OpenVINO and ONNX Runtime run in int8.
            - "onnxruntime": the integer product itself (MatMulInteger), with the model's sums to the last bit. OpenVINO
              runs it in floating point.
            - "tensorrt": Q/DQ nodes of signed codes, as TensorRT wants them. It was never run there.
            - "custom": operators of the domain `ptq4vm`, fused, which ONNX Runtime runs with the library that
              `ptq4vm.onnx.library()` names, at the speed of `ptq4vm.fuse`.

    Returns:
        The path. The file's metadata hold the preprocessing of images ("ptq4vm.preprocessing", JSON) and, where the
        model's `pretrained_cfg` has `label_names`, the names of the classes in order ("ptq4vm.classes", JSON).

    Raises:
        ImportError: naming the extra, where onnx or onnxscript is missing.
        ValueError: for a graph that is not lowered, an unknown runtime, another suffix, or an operator that ONNX has no
            translation of, which is named.

    Example:
        >>> import tempfile, torch, ptq4vm, ptq4vm.onnx
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), torch.randn(4, 5, 8)
        >>> quantized = ptq4vm.quantize(model, [images], ptq4vm.QuantConfig.minmax(8), progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = ptq4vm.onnx.export(quantized, f"{folder}/model.onnx")
        ...     path.stat().st_size > 0
        True
    """
    path = Path(path)
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(map(repr, RUNTIMES))}, got {runtime!r}")
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: the name of an ONNX file ends in .onnx")
    if FUSIONS in quantized.meta:
        raise ValueError("a fused model is laid out for this machine: export the one that ptq4vm.fuse was given")
    metadata = metadata_of(quantized)
    if not is_lowered(quantized):
        raise ValueError("only lowered models are exported: call ptq4vm.convert(prepared) without lower=False")
    require("an ONNX file", "onnx", "onnx", "onnxscript")
    import onnx_ir as ir

    graph = converted_graph(quantized, fusing_pipeline()) if runtime == "custom" else quantized
    model = onnx_model(graph, runtime)
    model.producer_name, model.producer_version = "ptq4vm", __version__
    model.metadata_props["ptq4vm.runtime"] = runtime
    if metadata.architecture:
        model.metadata_props["ptq4vm.architecture"] = metadata.architecture["name"]
        preprocessing = dict(metadata.architecture["preprocessing"])
        if names := preprocessing.pop("label_names", None):
            model.metadata_props["ptq4vm.classes"] = json.dumps(names)
        model.metadata_props["ptq4vm.preprocessing"] = json.dumps(preprocessing)
    replace_file(path, lambda temporary: ir.save(model, temporary))
    return path


def onnx_model(gm: GraphModule, runtime: str) -> ir.Model:
    """Returns any captured graph, lowered or in floating point, as a model for a runtime."""
    from ptq4vm.onnx.stock import expand
    from ptq4vm.onnx.tidy import tidy
    from ptq4vm.onnx.translate import translate

    return tidy(expand(translate(gm), _forms()[runtime]))


def _forms() -> dict[str, Form | None]:
    from ptq4vm.onnx.quantization import Form

    return {
        "portable": Form(),
        "onnxruntime": Form(matmul_integer=True),
        "tensorrt": Form(signed=True),
        "custom": None,
    }
