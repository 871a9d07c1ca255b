// ops.fake_quantize and its gradient, which only the CPU has: whatever the dtype, they compute in float32.
#include "run.h"

#define PTQ4VM_FAKE "Tensor x, Tensor scale, Tensor? zero_point, Tensor? smooth, int bits"

namespace ptq4vm {
namespace {

struct FakeQuantizeInputs {
  Tensor x, scale;
  Optional zero_point, smooth;
  FakeQuantize q = {};  // without y

  FakeQuantizeInputs(const Tensor& x_, const Tensor& scale_, const Optional& zero_, const Optional& smooth_,
                     int64_t bits)
      : x(x_), scale(scale_), zero_point(zero_), smooth(smooth_) {
    check_bits(bits), check_channels("x", x);
    q.rows = rows_of(x), q.channels = channels_of(x), q.scales = scales_of(x, scale);
    if (zero_point) check_zero_points("zero_point", *zero_point, scale);
    check_shape("smooth", smooth, {q.channels});
    x = floats("x", x), scale = floats("scale", scale), smooth = floats("smooth", smooth);
    // Zero points that learn are numbers like others.
    if (zero_point && is_integer(zero_point->scalar_type())) {
      zero_point = to_contiguous(*zero_point, ScalarType::Float);
    }
    zero_point = floats("zero_point", zero_point);
    q.x = const_ptr<float>(x), q.smooth = const_ptr<float>(smooth);
    q.scale = const_ptr<float>(scale), q.zero_point = const_ptr<float>(zero_point);
    q.low = zero_point ? lowest(bits) : -highest(bits), q.high = highest(bits);
  }
};

Tensor fake_quantize(Tensor x, Tensor scale, Optional zero_point, Optional smooth, int64_t bits) {
  FakeQuantizeInputs inputs(x, scale, zero_point, smooth, bits);
  Tensor y = empty_like(inputs.x, ScalarType::Float);
  inputs.q.y = mutable_ptr<float>(y);
  run(x, inputs.q);
  return cast_like(y, x);
}

// Sums rows that are `period` apart, of which there is a multiple, in their order.
void sum_rows(const std::vector<float>& rows, int64_t width, Tensor& sums, int64_t period) {
  std::vector<double> exact(period * width, 0.0);
  for (size_t first = 0; first < rows.size(); first += exact.size()) {
    for (size_t i = 0; i < exact.size(); i++) exact[i] += rows[first + i];
  }
  std::copy(exact.begin(), exact.end(), mutable_ptr<float>(sums));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize_backward(Tensor grad, Tensor x, Tensor scale,
                                                                  Optional zero_point, Optional smooth, int64_t bits,
                                                                  bool need_x, bool need_scale, bool need_zero_point,
                                                                  bool need_smooth) {
  const FakeQuantizeInputs inputs(x, scale, zero_point, smooth, bits);
  check_shape("grad", grad, x.sizes());
  PTQ4VM_CHECK(smooth || !need_smooth, "there is no smoothing whose gradient could be given");
  PTQ4VM_CHECK(zero_point || !need_zero_point, "there is no zero point whose gradient could be given");
  grad = floats("grad", grad);
  const FakeQuantize& forward = inputs.q;
  const auto none = [&] { return empty_like(inputs.x, {0}, ScalarType::Float); };
  Tensor dx = need_x ? empty_like(inputs.x, ScalarType::Float) : none();
  std::vector<float> scales(need_scale ? forward.rows : 0), zeros(need_zero_point ? forward.rows : 0);
  std::vector<float> by_block(need_smooth ? divided_up(forward.rows, ROWS_IN_SUM) * forward.channels : 0);
  run(x, FakeQuantizeBackward{.forward = forward,
                              .grad = const_ptr<float>(grad),
                              .x = need_x ? mutable_ptr<float>(dx) : nullptr,
                              .scale = need_scale ? scales.data() : nullptr,
                              .zero_point = need_zero_point ? zeros.data() : nullptr,
                              .smooth = need_smooth ? by_block.data() : nullptr});
  const auto summed = [&](bool needed, const std::vector<float>& by_row) {
    if (!needed) return none();
    Tensor sums = empty_like(inputs.x, scale.sizes(), ScalarType::Float);
    if (scale.numel()) sum_rows(by_row, 1, sums, scale.numel());
    return sums;
  };
  Tensor dsmooth = need_smooth ? empty_like(inputs.x, {forward.channels}, ScalarType::Float) : none();
  if (need_smooth) sum_rows(by_block, forward.channels, dsmooth, 1);
  return {cast_like(dx, x), cast_like(summed(need_scale, scales), scale), summed(need_zero_point, zeros),
          cast_like(dsmooth, smooth ? *smooth : x)};
}

}  // namespace
}  // namespace ptq4vm

PTQ4VM_IMPL(fake_quantize, "(" PTQ4VM_FAKE ") -> Tensor")
PTQ4VM_IMPL(fake_quantize_backward, "(Tensor grad, " PTQ4VM_FAKE
                                    ", bool need_x, bool need_scale, bool need_zero_point, bool need_smooth) -> "
                                    "(Tensor, Tensor, Tensor, Tensor)")
