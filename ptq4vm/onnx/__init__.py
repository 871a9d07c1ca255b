"""Models outside of Python: ONNX files, and the operators that ONNX Runtime runs them with.

Importing this package imports neither onnx nor a runtime; `export` needs the extra `onnx`.
"""

from ptq4vm.onnx.export import export as export
from ptq4vm.onnx.library import library as library
