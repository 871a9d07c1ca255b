// The integer linears: ops.linear, ops.linear_packed and linear_gelu_quantize.
#include "linear_inputs.h"
#include "run.h"

#define PTQ4VM_LINEAR                                                                                      \
  "Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_sum, Tensor weight_scale, " \
  "Tensor? bias"

namespace ptq4vm {

namespace {

void check_plain_weight(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  const bool nibbles = weight.scalar_type() == ScalarType::Byte;
  PTQ4VM_CHECK((nibbles || weight.scalar_type() == ScalarType::Char) && weight.dim() == 2,
               "weight must be int8 (N, D), or uint8 (N, ceil(D / 2)) with two 4-bit codes a byte, it is ",
               name(weight.scalar_type()), " of shape ", shape_text(weight.sizes()));
  check_codes("x", x, 1);
  const int64_t channels = channels_of(x), columns = nibbles ? divided_up(channels, 2) : channels;
  PTQ4VM_CHECK(weight.size(1) == columns, "a ", nibbles ? "packed 4-bit" : "int8", " weight for ", channels,
               " channels has ", columns, " columns, this one ", weight.size(1));
  PTQ4VM_CHECK(channels < 1 << 16, "sums of ", channels, " products of int8 codes may not fit int32");
  check_shape("weight_scale", scale, {weight.size(0)});
}

void check_out_dtype(ScalarType type) {
  PTQ4VM_CHECK(is_float(type), "out_dtype must be float32, bfloat16, float16 or float64, it is ", name(type));
}

// Types that kernels do not write go by way of float32.
Tensor run_as(const LinearInputs& inputs, ScalarType type) {
  const Tensor y = run_linear(inputs, has_kernels(type) ? type : ScalarType::Float);
  return y.scalar_type() == type ? y : to(y, type);
}

Tensor linear_packed(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor sum, Tensor scale,
                     Optional bias, ScalarType type) {
  check_out_dtype(type);
  return run_as({x, x_scale, zero_point, weight, sum, scale, bias}, type);
}

Tensor linear(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor scale, Optional bias,
              ScalarType type) {
  check_out_dtype(type), check_plain_weight(x, weight, scale);
  const auto [packed, sum] = pack_plain_weight(to_contiguous(weight), channels_of(x));
  return run_as({x, x_scale, zero_point, packed, sum, scale, bias}, type);
}

Tensor linear_gelu_quantize(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor sum, Tensor scale,
                            Optional bias, bool rotated, Tensor inv_scale, Tensor new_zero_point, Optional inv_smooth,
                            int64_t bits) {
  const LinearInputs inputs(x, x_scale, zero_point, weight, sum, scale, bias);
  PTQ4VM_CHECK(!inputs.stacked, "a GELU follows one linear, not ", inputs.directions, " stacked ones");
  check_shape("inv_smooth", inv_smooth, {inputs.features});
  const OutputQParams qparams(inv_scale, new_zero_point, inv_smooth, bits, scales_of(inputs.x, inv_scale));
  return rotated ? run_linear_gelu_rotated(inputs, qparams.view()) : run_linear_gelu(inputs, qparams.view());
}

}  // namespace
}  // namespace ptq4vm

PTQ4VM_IMPL(linear,
            "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, "
            "ScalarType out_dtype) -> Tensor",
            OUT_DTYPE)
PTQ4VM_IMPL(linear_packed, "(" PTQ4VM_LINEAR ", ScalarType out_dtype) -> Tensor", OUT_DTYPE)
PTQ4VM_IMPL(linear_gelu_quantize, "(" PTQ4VM_LINEAR ", bool rotated, " PTQ4VM_QPARAMS ") -> Tensor", INT8)
