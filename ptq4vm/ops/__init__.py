"""The `ptq4vm::` operators, one family a file: schema, checks, fake, reference and gradient of each stand together.

- Define: put `@operator(schema, shapes, fake)` above the reference, a function in plain PyTorch (`_define.py`).
- Call: `ops.quantize` is the operator; `quantization.quantize` of the family's module is its reference, unchecked.
- Kernel: a native one registers for its device and takes precedence, then one in Triton; both equal the reference.
"""

from __future__ import annotations

from typing import Any

import torch

from ptq4vm.ops import (  # noqa: F401
    convolution_1d,
    convolution_2d,
    directional_scans,
    fake_quantization,
    linears,
    norms,
    quantization,
    rotation,
    scans,
)
from ptq4vm.ops._define import REFERENCES as REFERENCES
from ptq4vm.ops._define import SCHEMAS as SCHEMAS
from ptq4vm.ops._define import serve_other_gpus_later

serve_other_gpus_later()


def __getattr__(name: str) -> Any:
    if name not in REFERENCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.ops.ptq4vm, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *REFERENCES])
