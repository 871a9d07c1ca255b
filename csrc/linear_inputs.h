// What the integer linears read, checked.
#pragma once

#include "glue.h"

namespace ptq4vm {
namespace {

constexpr int64_t STEP = 64;  // channels of a packed weight's tile

// The inputs of one linear, or of K stacked ones, contiguous and of the types that kernels take. The weight is that of
// fused.pack_weight, or has padded rows as from fused.pad_weight.
struct LinearInputs {
  Tensor x, x_scale, zero_point, weight, sum, scale;
  Optional bias;
  bool stacked, nibbles, in_rows;
  int64_t directions, rows = 1, scales, channels, features;
  int64_t padded;  // channels of a weight in rows

  LinearInputs(const Tensor& x_, const Tensor& x_scale_, const Tensor& zero_point_, const Tensor& weight_,
               const Tensor& sum_, const Tensor& scale_, const Optional& bias_)
      : x(x_), x_scale(x_scale_), zero_point(zero_point_), weight(weight_), sum(sum_), scale(scale_), bias(bias_) {
    stacked = scale.dim() == 2;
    PTQ4VM_CHECK(stacked || scale.dim() == 1, "weight_scale must be (N,), or (K, N) for K linears, its shape is ",
                 shape_text(scale.sizes()));
    check_codes("x", x, 1 + stacked);
    directions = stacked ? scale.size(0) : 1;
    features = scale.size(scale.dim() - 1), channels = x.size(x.dim() - 1);
    PTQ4VM_CHECK(!stacked || x.size(0) == directions, "x has ", x.size(0), " directions, the weight ", directions);
    scales = qparams(x, x_scale, stacked);
    check_zero_points("x_zero_point", zero_point, x_scale);
    nibbles = weight.scalar_type() == ScalarType::Byte;
    PTQ4VM_CHECK(nibbles || weight.scalar_type() == ScalarType::Char,
                 "weight must be int8 codes, or uint8 with two of 4 bits a byte, it is ", name(weight.scalar_type()));
    PTQ4VM_CHECK(channels < 1 << 16, "sums of ", channels, " products of int8 codes may not fit int32");
    in_rows = weight.dim() == 2 + stacked;
    padded = divided_up(channels, nibbles ? 32 : 16) * (nibbles ? 32 : 16);
    const int64_t bytes = in_rows ? padded : STEP, columns = nibbles ? bytes / 2 : bytes;
    const int64_t steps = divided_up(channels, STEP), count = groups(features);
    std::vector<int64_t> want{directions, count, steps, LANES, columns};
    if (in_rows) want = {directions, features, columns};
    if (!stacked) want.erase(want.begin());
    PTQ4VM_CHECK(same_sizes(weight.sizes(), want), "a weight of ", features, " × ", channels,
                 " channels is packed into (", count, ", ", steps, ", 16, 64) int8 or (…, 32) uint8, this one is ",
                 shape_text(weight.sizes()), " ", name(weight.scalar_type()),
                 "; pack it with ptq4vm.fused.pack_weight");
    if (stacked) {
      check_shape("weight_sum", sum, {directions, features});
      check_shape("bias", bias, {directions, features});
    } else {
      check_shape("weight_sum", sum, {features});
      check_shape("bias", bias, {features});
    }
    for (int64_t i = stacked; i + 1 < x.dim(); i++) rows = product("the sizes of x", rows, x.size(i));
    x = as_contiguous(x), weight = as_contiguous(weight);
    x_scale = floats("x_scale", x_scale), zero_point = zero_points("x_zero_point", zero_point);
    sum = weight_sums("weight_sum", sum, channels);
    scale = floats("weight_scale", scale), bias = floats("bias", bias);
  }
};

// Checks the weight of a linear that is not packed.
inline void check_plain_weight(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  const bool nibbles = weight.scalar_type() == ScalarType::Byte;
  PTQ4VM_CHECK((nibbles || weight.scalar_type() == ScalarType::Char) && weight.dim() == 2,
               "weight must be int8 (N, D), or uint8 (N, ceil(D / 2)) with two 4-bit codes a byte, it is ",
               name(weight.scalar_type()), " of shape ", shape_text(weight.sizes()));
  check_codes("x", x, 1);
  const int64_t channels = x.size(x.dim() - 1), columns = nibbles ? divided_up(channels, 2) : channels;
  PTQ4VM_CHECK(weight.size(1) == columns, "a ", nibbles ? "packed 4-bit" : "int8", " weight for ", channels,
               " channels has ", columns, " columns, this one ", weight.size(1));
  PTQ4VM_CHECK(channels < 1 << 16, "sums of ", channels, " products of int8 codes may not fit int32");
  check_shape("weight_scale", scale, {weight.size(0)});
}

inline void check_out_dtype(ScalarType type) {
  PTQ4VM_CHECK(is_float(type), "out_dtype must be float32, bfloat16, float16 or float64, it is ", name(type));
}

// The qparams of the codes of a linear's GELU.
inline Codes gelu_codes(const LinearInputs& linear, const Tensor& inv_scale, const Tensor& zero_point,
                        const Optional& inv_smooth, int64_t bits) {
  PTQ4VM_CHECK(!linear.stacked, "a GELU follows one linear, not ", linear.directions, " stacked ones");
  check_shape("inv_smooth", inv_smooth, {linear.features});
  return Codes(inv_scale, zero_point, inv_smooth, bits, qparams(linear.x, inv_scale));
}

}  // namespace
}  // namespace ptq4vm
