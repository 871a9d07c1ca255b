// The operators' schemas, as ptq4vm/ops.py defines them where the libraries are missing; a test holds them equal.
#pragma once

#define PTQ4VM_SCAN                                                                                  \
  "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, " \
  "bool delta_softplus"
#define PTQ4VM_CONV "Tensor x, Tensor weight, Tensor? bias, bool silu"
#define PTQ4VM_FAKE "Tensor x, Tensor scale, Tensor? zero_point, Tensor? smooth, int bits"
#define PTQ4VM_QPARAMS "Tensor inv_scale, Tensor zero_point, Tensor? inv_smooth, int bits"
#define PTQ4VM_LINEAR                                                                                      \
  "Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_sum, Tensor weight_scale, " \
  "Tensor? bias"
#define PTQ4VM_STEPS                                                                               \
  "Tensor u, Tensor projected, Tensor step_inv_scale, Tensor step_scale, Tensor step_zero_point, " \
  "Tensor? step_inv_smooth, int step_bits, Tensor step_weight, Tensor step_weight_sum, "           \
  "Tensor step_weight_scale, Tensor step_bias, Tensor A, Tensor? D, Tensor? z, Tensor order"

namespace ptq4vm {
namespace {

constexpr const char* SCHEMAS[] = {
    "quantize(Tensor x, Tensor inv_scale, Tensor zero_point, Tensor? inv_smooth, int bits) -> Tensor",
    "choose_qparams(Tensor x, Tensor? inv_smooth, int bits) -> (Tensor scale, Tensor zero_point)",
    "rotate(Tensor x) -> Tensor",
    "dequantize(Tensor x_q, Tensor scale, Tensor zero_point) -> Tensor",
    "linear(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    "selective_scan(" PTQ4VM_SCAN ") -> Tensor",
    "selective_scan_backward(Tensor grad, " PTQ4VM_SCAN
    ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "selective_scan_quantized(" PTQ4VM_SCAN ", Tensor state_scale, Tensor state_inv_scale, int bits) -> Tensor",
    "causal_conv1d(" PTQ4VM_CONV ") -> Tensor",
    "causal_conv1d_backward(Tensor grad, " PTQ4VM_CONV ") -> (Tensor, Tensor, Tensor)",
    "fake_quantize(" PTQ4VM_FAKE ") -> Tensor",
    "fake_quantize_backward(Tensor grad, " PTQ4VM_FAKE
    ", bool need_x, bool need_scale, bool need_zero_point, bool need_smooth) -> (Tensor, Tensor, Tensor, Tensor)",
    "linear_packed(" PTQ4VM_LINEAR ", ScalarType out_dtype) -> Tensor",
    "linear_gelu_quantize(" PTQ4VM_LINEAR ", bool rotated, " PTQ4VM_QPARAMS ") -> Tensor",
    "rotate_quantize(Tensor x, bool gelu, " PTQ4VM_QPARAMS ") -> Tensor",
    "norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, "
    "bool rotated, " PTQ4VM_QPARAMS ") -> (Tensor, Tensor)",
    "conv1d_quantize(Tensor x, Tensor weight, Tensor? bias, Tensor order, " PTQ4VM_QPARAMS ") -> (Tensor, Tensor)",
    "conv2d_quantize(Tensor x, Tensor weight, Tensor? bias, int height, int width, " PTQ4VM_QPARAMS
    ") -> (Tensor, Tensor)",
    "directional_scan(" PTQ4VM_STEPS ", bool merge, float factor) -> Tensor",
    "directional_scan_quantize(" PTQ4VM_STEPS ", float factor, " PTQ4VM_QPARAMS ") -> Tensor",
};

}  // namespace
}  // namespace ptq4vm
