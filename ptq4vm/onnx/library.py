"""Where the library of custom operators for ONNX Runtime is."""

from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "_onnxruntime.so"


def library() -> Path:
    """Returns the library with which ONNX Runtime runs a model that was exported with `runtime="custom"`.

    It is the fused operators for CPUs, without torch: a process needs ONNX Runtime (1.17 or newer), the model, and this
    file, which may be copied.

    Raises:
        ImportError: ptq4vm was installed without it.

    Example:
        >>> import onnxruntime
        >>> from ptq4vm.onnx import library
        >>> options = onnxruntime.SessionOptions()
        >>> options.register_custom_ops_library(str(library()))
    """
    if not LIBRARY.exists():
        raise ImportError(
            f"ptq4vm was installed without {LIBRARY.name}: install a C++ compiler (GCC or Clang), then ptq4vm again "
            "(`pip install --force-reinstall --no-deps`)"
        )
    return LIBRARY
