// The inputs of the integer linears, and what the library of a device brings to them: weights are packed for each.
#pragma once

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

  LinearInputs(const Tensor& x, const Tensor& x_scale, const Tensor& zero_point, const Tensor& weight,
               const Tensor& sum, const Tensor& scale, const Optional& bias);

 private:
  void check_weight() const;
};

// A weight as LinearInputs take it, and the sums of its codes.
struct PackedPlainWeight {
  Tensor weight, sum;
};

// Packs int8 (N, channels), or uint8 with two 4-bit codes a byte.
PackedPlainWeight pack_plain_weight(const Tensor& weight, int64_t channels);

// Runs the linear; `type` is one that kernels write.
Tensor run_linear(const LinearInputs&, ScalarType type);

// Returns the codes of its GELU.
Tensor run_linear_gelu(const LinearInputs&, const QParams&);
Tensor run_linear_gelu_rotated(const LinearInputs&, const QParams&);

}  // namespace ptq4vm
