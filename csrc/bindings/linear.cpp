// The integer linears: ops.linear, ops.linear_packed and linear_gelu_quantize.
#include "linear_inputs.h"
#include "run.h"

#define PTQ4VM_LINEAR                                                                                      \
  "Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_sum, Tensor weight_scale, " \
  "Tensor? bias"

namespace ptq4vm {

LinearInputs::LinearInputs(const Tensor& x_, const Tensor& x_scale_, const Tensor& zero_point_, const Tensor& weight_,
                           const Tensor& sum_, const Tensor& scale_, const Optional& bias_)
    : x(x_), x_scale(x_scale_), zero_point(zero_point_), weight(weight_), sum(sum_), scale(scale_), bias(bias_) {
  stacked = scale.dim() == 2;
  PTQ4VM_CHECK(stacked || scale.dim() == 1, "weight_scale must be (N,), or (K, N) for K linears, its shape is ",
               shape_text(scale.sizes()));
  check_codes("x", x, 1 + stacked);
  directions = stacked ? scale.size(0) : 1;
  features = scale.size(scale.dim() - 1), channels = channels_of(x);
  PTQ4VM_CHECK(!stacked || x.size(0) == directions, "x has ", x.size(0), " directions, the weight ", directions);
  scales = scales_of(x, x_scale, stacked);
  check_zero_points("x_zero_point", zero_point, x_scale);
  nibbles = weight.scalar_type() == ScalarType::Byte;
  in_rows = weight.dim() == 2 + stacked;
  padded = round_up(channels, nibbles ? 32 : 16);
  check_weight();
  check_shape("weight_sum", sum, scale.sizes());
  check_shape("bias", bias, scale.sizes());
  for (int64_t i = stacked; i + 1 < x.dim(); i++) rows = product("the sizes of x", rows, x.size(i));
  x = to_contiguous(x), weight = to_contiguous(weight);
  x_scale = floats("x_scale", x_scale), zero_point = zero_points("x_zero_point", zero_point);
  sum = weight_sums("weight_sum", sum, channels);
  scale = floats("weight_scale", scale), bias = floats("bias", bias);
}

void LinearInputs::check_weight() const {
  PTQ4VM_CHECK(nibbles || weight.scalar_type() == ScalarType::Char,
               "weight must be int8 codes, or uint8 with two of 4 bits a byte, it is ", name(weight.scalar_type()));
  PTQ4VM_CHECK(channels < 1 << 16, "sums of ", channels, " products of int8 codes may not fit int32");
  const int64_t codes = in_rows ? padded : K_TILE, columns = nibbles ? codes / 2 : codes;
  const int64_t k_tiles = divided_up(channels, K_TILE), count = groups(features);
  std::vector<int64_t> want{directions, count, k_tiles, LANES, columns};
  if (in_rows) want = {directions, features, columns};
  if (!stacked) want.erase(want.begin());
  PTQ4VM_CHECK(same_sizes(weight.sizes(), want), "a weight of ", features, " × ", channels,
               " channels is packed into (", count, ", ", k_tiles, ", 16, 64) int8 or (…, 32) uint8, this one is ",
               shape_text(weight.sizes()), " ", name(weight.scalar_type()),
               "; pack it with ptq4vm.ops.layouts.pack_weight");
}

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
  return y.scalar_type() == type ? y : torch::stable::to(y, type);
}

Tensor linear_packed(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor sum, Tensor scale,
                     Optional bias, ScalarType type) {
  check_out_dtype(type);
  return run_as({x, x_scale, zero_point, weight, sum, scale, bias}, type);
}

Tensor linear(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor scale, Optional bias,
              ScalarType type) {
  check_out_dtype(type), check_plain_weight(x, weight, scale);
  const PackedPlainWeight packed = pack_plain_weight(to_contiguous(weight), channels_of(x));
  return run_as({x, x_scale, zero_point, packed.weight, packed.sum, scale, bias}, type);
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
            "ScalarType out_dtype) -> Tensor")
PTQ4VM_IMPL(linear_packed, "(" PTQ4VM_LINEAR ", ScalarType out_dtype) -> Tensor")
PTQ4VM_IMPL(linear_gelu_quantize, "(" PTQ4VM_LINEAR ", bool rotated, " PTQ4VM_QPARAMS ") -> Tensor")
