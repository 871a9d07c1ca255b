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
    STD_TORCH_CHECK(stacked || scale.dim() == 1, "weight_scale must be (N,), or (K, N) for K linears");
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char && x.dim() >= 1 + stacked,
                    "x must be int8 codes with a channel axis", stacked ? ", and one of directions" : "");
    directions = stacked ? scale.size(0) : 1;
    features = scale.size(scale.dim() - 1), channels = x.size(x.dim() - 1);
    STD_TORCH_CHECK(!stacked || x.size(0) == directions, "x has ", x.size(0), " directions, the weight ", directions);
    scales = qparams(x, x_scale, stacked);
    STD_TORCH_CHECK(zero_point.numel() == x_scale.numel(), "there are ", x_scale.numel(), " scales and ",
                    zero_point.numel(), " zero points");
    nibbles = weight.scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(nibbles || weight.scalar_type() == ScalarType::Char,
                    "the weight must be int8 codes, or uint8 with two of 4 bits a byte");
    in_rows = weight.dim() == 2 + stacked;
    padded = divided_up(channels, nibbles ? 32 : 16) * (nibbles ? 32 : 16);
    const int64_t bytes = in_rows ? padded : STEP, columns = nibbles ? bytes / 2 : bytes;
    const int64_t steps = divided_up(channels, STEP), count = groups(features);
    const bool fits = in_rows ? weight.size(stacked) == features && weight.size(stacked + 1) == columns
                              : weight.dim() == 4 + stacked && weight.size(stacked) == count &&
                                    weight.numel() == directions * count * steps * LANES * columns;
    STD_TORCH_CHECK(fits && (!stacked || weight.size(0) == directions), "a weight of ", features, " × ", channels,
                    " channels is packed into (", count, ", ", steps,
                    ", 16, 64) int8 or (…, 32) uint8; pack it with ptq4vm.fused.pack_weight");
    if (stacked) {
      check_shape("weight_sum", sum, {directions, features});
      check_shape("bias", bias, {directions, features});
    } else {
      check_shape("weight_sum", sum, {features});
      check_shape("bias", bias, {features});
    }
    for (int64_t i = stacked; i + 1 < x.dim(); i++) rows *= x.size(i);
    x = as_contiguous(x), weight = as_contiguous(weight);
    x_scale = as(x_scale, ScalarType::Float), zero_point = as(zero_point, ScalarType::Int);
    if (!ON_GPU) {
      const int32_t *zero_points = in<int32_t>(zero_point), *end = zero_points + zero_point.numel();
      const auto not_code = std::find_if(zero_points, end, [](int32_t z) { return z != static_cast<int8_t>(z); });
      STD_TORCH_CHECK(not_code == end, "zero points are int8 codes, one is ", *not_code);
    }
    STD_TORCH_CHECK(channels < 1 << 16, "sums of ", channels, " products of int8 codes may not fit int32");
    sum = as(sum, ScalarType::Int), scale = as(scale, ScalarType::Float), bias = as(bias, ScalarType::Float);
  }
};

// Checks the weight of a linear that is not packed.
inline void check_plain_weight(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  const bool nibbles = weight.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK((nibbles || weight.scalar_type() == ScalarType::Char) && weight.dim() == 2 && x.dim() >= 1,
                  "the weight must be int8 (N, D), or uint8 (N, ceil(D / 2)) with two 4-bit codes a byte");
  const int64_t channels = x.size(x.dim() - 1), columns = nibbles ? divided_up(channels, 2) : channels;
  STD_TORCH_CHECK(weight.size(1) == columns, "a ", nibbles ? "packed 4-bit" : "int8", " weight for ", channels,
                  " channels has ", columns, " columns, this one ", weight.size(1));
  check_shape("weight_scale", scale, {weight.size(0)});
}

// The qparams of the codes of a linear's GELU.
inline Codes gelu_codes(const LinearInputs& linear, const Tensor& inv_scale, const Tensor& zero_point,
                        const Optional& inv_smooth, int64_t bits) {
  STD_TORCH_CHECK(!linear.stacked, "a GELU follows one linear, not ", linear.directions, " stacked ones");
  check_shape("inv_smooth", inv_smooth, {linear.features});
  return Codes(inv_scale, zero_point, inv_smooth, bits, qparams(linear.x, inv_scale));
}

}  // namespace
}  // namespace ptq4vm
