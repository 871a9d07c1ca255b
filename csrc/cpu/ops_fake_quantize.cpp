// fake_quantize and its gradient on a CPU: whatever the dtype, they compute in float32.
#include "../glue.h"
#include "kernels.h"

namespace ptq4vm {
namespace {

struct FakeQuantizeInputs {
  Tensor x, scale;
  Optional zero_point, smooth;
  std::vector<int64_t> shape;
  int64_t rows, channels, scales, bits;

  FakeQuantizeInputs(const Tensor& x_, const Tensor& scale_, const Optional& zero_, const Optional& smooth_,
                     int64_t bits_)
      : x(x_), scale(scale_), zero_point(zero_), smooth(smooth_), bits(bits_) {
    check_bits(bits);
    check_channels("x", x);
    scales = qparams(x, scale), channels = x.size(x.dim() - 1);
    if (zero_point) check_zero_points("zero_point", *zero_point, scale);
    check_shape("smooth", smooth, {channels});
    shape = with_last(x, channels);
    rows = channels ? x.numel() / channels : 0;
    x = floats("x", x), scale = floats("scale", scale), smooth = floats("smooth", smooth);
    // Zero points that learn are numbers like others.
    if (zero_point && is_integer(zero_point->scalar_type())) zero_point = as(zero_point, ScalarType::Float);
    zero_point = floats("zero_point", zero_point);
  }

  Tensor like_x() const { return torch::stable::new_empty(x, {shape.data(), shape.size()}, ScalarType::Float); }

  FakeQuantize view(float* y) const {
    const int half_range = 1 << (bits - 1);
    return {in<float>(x),
            in<float>(smooth),
            in<float>(scale),
            in<float>(zero_point),
            y,
            rows,
            channels,
            scales,
            zero_point ? -half_range : 1 - half_range,
            half_range - 1};
  }
};

Tensor fake_quantize(Tensor x, Tensor scale, Optional zero_point, Optional smooth, int64_t bits) {
  const FakeQuantizeInputs inputs(x, scale, zero_point, smooth, bits);
  Tensor y = inputs.like_x();
  const FakeQuantize q = inputs.view(out<float>(y));
  const auto run = kernels().fake_quantize;
  torch::stable::parallel_for(0, q.rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, q.channels)),
                              [&](int64_t begin, int64_t end) { run(q, begin, end); });
  return as(y, x.scalar_type());
}

// Sums of rows that are `period` apart, in their order, whatever the number of threads.
void sum_rows(const float* rows, int64_t count, int64_t width, float* sums, int64_t period) {
  std::vector<double> exact(period * width, 0.0);
  for (int64_t r = 0; r < count; r++) {
    double* to = exact.data() + r % period * width;
    for (int64_t i = 0; i < width; i++) to[i] += rows[r * width + i];
  }
  std::copy(exact.begin(), exact.end(), sums);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize_backward(Tensor grad, Tensor x, Tensor scale,
                                                                  Optional zero_point, Optional smooth, int64_t bits,
                                                                  bool need_x, bool need_scale, bool need_zero_point,
                                                                  bool need_smooth) {
  const FakeQuantizeInputs inputs(x, scale, zero_point, smooth, bits);
  check_sizes("grad", grad, inputs.shape);
  PTQ4VM_CHECK(smooth || !need_smooth, "there is no smoothing whose gradient could be given");
  PTQ4VM_CHECK(zero_point || !need_zero_point, "there is no zero point whose gradient could be given");
  grad = floats("grad", grad);
  const FakeQuantize q = inputs.view(nullptr);
  const int64_t blocks = (q.rows + ROWS_IN_SUM - 1) / ROWS_IN_SUM;
  const auto none = [&] { return make(inputs.x, {0}, ScalarType::Float); };
  Tensor dx = need_x ? inputs.like_x() : none();
  std::vector<float> scales(need_scale ? q.rows : 0), zeros(need_zero_point ? q.rows : 0);
  std::vector<float> by_block(need_smooth ? blocks * q.channels : 0);
  const FakeQuantizeBackward b{q,
                               in<float>(grad),
                               need_x ? out<float>(dx) : nullptr,
                               need_scale ? scales.data() : nullptr,
                               need_zero_point ? zeros.data() : nullptr,
                               need_smooth ? by_block.data() : nullptr};
  const auto run = kernels().fake_quantize_backward;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { run(b, begin, end); });
  const auto summed = [&](bool needed, const std::vector<float>& by_row) {
    if (!needed) return none();
    Tensor sums = torch::stable::new_empty(inputs.x, scale.sizes(), ScalarType::Float);
    if (scale.numel()) sum_rows(by_row.data(), q.rows, 1, out<float>(sums), scale.numel());
    return sums;
  };
  Tensor dsmooth = need_smooth ? make(inputs.x, {q.channels}, ScalarType::Float) : none();
  if (need_smooth) sum_rows(by_block.data(), blocks, q.channels, out<float>(dsmooth), 1);
  return {as(dx, x.scalar_type()), as(summed(need_scale, scales), scale.scalar_type()), summed(need_zero_point, zeros),
          as(dsmooth, (smooth ? *smooth : x).scalar_type())};
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(PTQ4VM_LIBRARY, PTQ4VM_KEY, m) {
  PTQ4VM_IMPL(m, fake_quantize);
  PTQ4VM_IMPL(m, fake_quantize_backward);
}
