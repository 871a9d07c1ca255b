"""Models outside of Python: ONNX files, and the operators that ONNX Runtime runs them with."""

from ptq4vm.onnx.library import library

__all__ = ["library"]
