// The operators' schemas, as ptq4vm/ops.py defines them where this library is missing; a test holds them equal.
#include <torch/csrc/stable/library.h>

#define PTQ4VM_SCAN                                                                                     \
  "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "    \
  "bool delta_softplus"
#define PTQ4VM_CONV "Tensor x, Tensor weight, Tensor? bias, bool silu"

STABLE_TORCH_LIBRARY(ptq4vm, m) {
  m.def("quantize(Tensor x, Tensor inv_scale, Tensor zero_point, Tensor? inv_smooth, int bits) -> Tensor");
  m.def("choose_qparams(Tensor x, Tensor? inv_smooth, int bits) -> (Tensor scale, Tensor zero_point)");
  m.def("dequantize(Tensor x_q, Tensor scale, Tensor zero_point) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, "
      "ScalarType out_dtype) -> Tensor");
  m.def("selective_scan(" PTQ4VM_SCAN ") -> Tensor");
  m.def("selective_scan_backward(Tensor grad, " PTQ4VM_SCAN
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("causal_conv1d(" PTQ4VM_CONV ") -> Tensor");
  m.def("causal_conv1d_backward(Tensor grad, " PTQ4VM_CONV ") -> (Tensor, Tensor, Tensor)");
  m.def("_use_isa(str name) -> str");
}
