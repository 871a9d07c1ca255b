"""Writes quantized models as ONNX files, which run in int8 without PyTorch.

Importing this package imports neither onnx nor a runtime; `export` needs the extra `onnx`.
"""

from ptq4vm.onnx.export import RUNTIMES as RUNTIMES
from ptq4vm.onnx.export import export as export
