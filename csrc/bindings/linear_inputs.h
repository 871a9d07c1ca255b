// The inputs of the integer linears, and what the library of a device brings to them: weights are packed for each.
#pragma once

#include <tuple>

#include "qparams.h"

namespace ptq4vm {

// The inputs of one linear, or of K stacked ones, checked, contiguous and of the types that kernels take. The weight is
// that of layouts.pack_weight, or has padded rows as from layouts.pad_weight.
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

 private:
  void check_weight() const {
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
};

// Packs int8 (N, channels), or uint8 with two 4-bit codes a byte: as LinearInputs take it, and with the sums of its codes.
std::tuple<Tensor, Tensor> pack_plain_weight(const Tensor& weight, int64_t channels);

// Runs the linear; `type` is one that kernels write.
Tensor run_linear(const LinearInputs&, ScalarType type);

// Returns the codes of its GELU.
Tensor run_linear_gelu(const LinearInputs&, const QParams&);
Tensor run_linear_gelu_rotated(const LinearInputs&, const QParams&);

}  // namespace ptq4vm
