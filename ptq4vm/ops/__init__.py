"""The `ptq4vm::` operators, one family a file: schema, checks, reference, fake and gradient of each stand together.

- Define: write the reference, a function in plain PyTorch, and pass it to `define` with its schema (`_define.py`).
- Call: `ops.quantize` is the operator; `quantization.quantize` in its family's module is its reference, unchecked.
- Kernel: a native one registers for its device and takes precedence, then one in Triton; both equal the reference.
"""

import torch

from ptq4vm.ops import convolution_2d, directional_scans, fake_quantization, gates, norms  # noqa: F401  and what they import
from ptq4vm.ops._define import REFERENCES as REFERENCES
from ptq4vm.ops._define import SCHEMAS as SCHEMAS
from ptq4vm.ops._define import serve_other_gpus_later

serve_other_gpus_later()

causal_conv1d = torch.ops.ptq4vm.causal_conv1d
choose_qparams = torch.ops.ptq4vm.choose_qparams
conv1d_quantize = torch.ops.ptq4vm.conv1d_quantize
conv2d_quantize = torch.ops.ptq4vm.conv2d_quantize
dequantize = torch.ops.ptq4vm.dequantize
directional_scan = torch.ops.ptq4vm.directional_scan
directional_scan_quantize = torch.ops.ptq4vm.directional_scan_quantize
fake_quantize = torch.ops.ptq4vm.fake_quantize
gate_quantize = torch.ops.ptq4vm.gate_quantize
linear = torch.ops.ptq4vm.linear
linear_gelu_quantize = torch.ops.ptq4vm.linear_gelu_quantize
linear_packed = torch.ops.ptq4vm.linear_packed
norm_quantize = torch.ops.ptq4vm.norm_quantize
quantize = torch.ops.ptq4vm.quantize
rotate = torch.ops.ptq4vm.rotate
rotate_quantize = torch.ops.ptq4vm.rotate_quantize
selective_scan = torch.ops.ptq4vm.selective_scan
selective_scan_quantized = torch.ops.ptq4vm.selective_scan_quantized
