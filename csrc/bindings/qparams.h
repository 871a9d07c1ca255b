// The quantization parameters of codes, and the rotation before them.
#pragma once

#include <cmath>

#include "checks.h"

#define PTQ4VM_QPARAMS "Tensor inv_scale, Tensor zero_point, Tensor? inv_smooth, int bits"

namespace ptq4vm {

inline void check_bits(int64_t bits) {
  PTQ4VM_CHECK(2 <= bits && bits <= 8, "bits must be between 2 and 8, got ", bits);
}

inline int lowest(int64_t bits) { return -(1 << (bits - 1)); }

inline int highest(int64_t bits) { return (1 << (bits - 1)) - 1; }

inline void check_codes(const char* argument, const Tensor& x, int64_t axes) {
  PTQ4VM_CHECK(x.scalar_type() == ScalarType::Char && x.dim() >= axes, argument, " must be int8 codes of at least ",
               axes, " axes, it is ", name(x.scalar_type()), " of shape ", shape_text(x.sizes()));
}

inline void check_zero_points(const char* argument, const Tensor& zero, const Tensor& scale) {
  PTQ4VM_CHECK(zero.numel() == scale.numel(), argument, ": there are ", scale.numel(), " scales and ", zero.numel(),
               " zero points");
  check_shape(argument, zero, scale.sizes());
}

inline void check_token_scales(int64_t scales, int64_t tokens, const char* whose = "token") {
  PTQ4VM_CHECK(scales == tokens || scales == 1, whose, " scales were calibrated for ", scales,
               " tokens, the input has ", tokens, "; calibrate at this resolution or use Granularity.PER_TENSOR");
}

// Returns the number of qparams (of a direction) of x (…, L, D): per tensor (1,), per token (L,), or per image and
// token (…, L). With `stacked`, x and its qparams have an axis of directions before these.
inline int64_t scales_of(const Tensor& x, const Tensor& scale, bool stacked = false) {
  const int64_t axes = x.dim() - stacked, own = scale.dim() - stacked;
  PTQ4VM_CHECK(!stacked || (own >= 0 && scale.size(0) == x.size(0)), "qparams of stacked inputs need an axis of ",
               x.size(0), " directions");
  if (own == 1) {
    check_token_scales(scale.size(stacked), axes > 1 ? x.size(x.dim() - 2) : 1);
  } else {
    const bool same = own == axes - 1 && same_sizes(scale.sizes(), {x.sizes().data(), x.sizes().size() - 1});
    PTQ4VM_CHECK(same, "scales of shape ", shape_text(scale.sizes()), " do not fit an input of shape ",
                 shape_text(x.sizes()), ": they need its shape without the last axis");
  }
  int64_t count = 1;
  for (int64_t i = stacked; i < scale.dim(); i++) count *= scale.size(i);
  return std::max<int64_t>(1, count);
}

// The qparams of codes that an operator writes, kept in the types that kernels read.
struct OutputQParams {
  Tensor inv_scale, zero_point;
  Optional inv_smooth;
  int64_t scales, bits;

  OutputQParams(const Tensor& inv, const Tensor& zero, const Optional& smooth, int64_t bits_, int64_t scales_of_set)
      : inv_scale((check_bits(bits_), check_zero_points("zero_point", zero, inv), floats("inv_scale", inv))),
        zero_point(zero_points("zero_point", zero)), inv_smooth(floats("inv_smooth", smooth)), scales(scales_of_set),
        bits(bits_) {}

  QParams view() const {
    return {.inv_scale = const_ptr<float>(inv_scale),
            .zero_point = const_ptr<int32_t>(zero_point),
            .inv_smooth = const_ptr<float>(inv_smooth),
            .scales = scales,
            .low = lowest(bits),
            .high = highest(bits)};
  }
};

// The rotation of so many channels, and its matrix.
class RotationMatrix {
 public:
  explicit RotationMatrix(int64_t channels) : channels_(channels), order_(std::max<int64_t>(1, channels & -channels)) {
    const int64_t size = channels / order_;
    const double turn = 2 * std::acos(-1.0) / static_cast<double>(size), norm = std::sqrt(static_cast<double>(size));
    for (int64_t i = 0; 1 < size && size <= MAX_HARTLEY && i < size * size; i++) {
      const double angle = turn * static_cast<double>((i / size) * (i % size));
      matrix_.push_back(static_cast<float>((std::cos(angle) + std::sin(angle)) / norm));
    }
  }

  Rotation view() const {
    const float factor = static_cast<float>(1 / std::sqrt(static_cast<double>(order_)));
    return {matrix_.empty() ? nullptr : matrix_.data(), channels_, order_, factor};
  }

 private:
  int64_t channels_, order_;
  std::vector<float> matrix_;
};

}  // namespace ptq4vm
