// Depth-wise convolutions: ops.causal_conv1d, ops.conv1d_quantize and conv2d_quantize.
#include "conv_inputs.h"
#include "run.h"

namespace ptq4vm {
namespace {

Tensor causal_conv1d(Tensor x, Tensor weight, Optional bias, bool silu) {
  ConvInputs c(x, weight, bias, silu);
  Tensor y = empty_result(0, x, c.x.scalar_type());
  if (c.type == ScalarType::Double) {
    if (y.numel()) float64::conv(float64::Conv(c), mutable_ptr<double>(y));
    return y;
  }
  c.conv.y = y.mutable_data_ptr();
  run(x, c.conv);
  return cast_like(y, x);
}

// The qparams of K directions: scales (K, L) or (K, 1), inv_smooth (K, E).
OutputQParams qparams_of_directions(const Tensor& inv, const Tensor& zero, const Optional& smooth, int64_t bits,
                                    int64_t directions, const Tensor& x) {
  PTQ4VM_CHECK(inv.dim() == 2 && inv.size(0) == directions, "scales of ", directions, " directions must be (",
               directions, ", L) or (", directions, ", 1), their shape is ", shape_text(inv.sizes()));
  check_token_scales(inv.size(1), x.size(1));
  check_shape("inv_smooth", smooth, {directions, x.size(2)});
  return OutputQParams(inv, zero, smooth, bits, std::max<int64_t>(1, inv.size(1)));
}

std::tuple<Tensor, Tensor> conv1d_quantize(Tensor x, Tensor weight, Optional bias, Tensor order, Tensor inv_scale,
                                           Tensor zero_point, Optional inv_smooth, int64_t bits) {
  check_axes("x", x, 3, "(B, L, E)"), check_axes("weight", weight, 3, "(K, E, taps)");
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const int64_t directions = weight.size(0), taps = weight.size(2);
  PTQ4VM_CHECK(taps >= 1, "a convolution needs at least one tap");
  check_shape("weight", weight, {directions, channels, taps});
  check_shape("bias", bias, {directions, channels});
  check_shape("order", order, {directions, tokens});
  const OutputQParams qparams = qparams_of_directions(inv_scale, zero_point, inv_smooth, bits, directions, x);
  order = orders(order, tokens, true);
  weight = floats("weight", weight), bias = floats("bias", bias);
  const Tensor input = as_rows("x", x);
  Tensor u = empty_result(0, x, {directions, batch, tokens, channels}, input.scalar_type());
  Tensor codes = empty_result(1, x, u.sizes(), ScalarType::Char);
  run(x, Conv{.x = rows(input),
              .weight = const_ptr<float>(weight),
              .bias = const_ptr<float>(bias),
              .order = const_ptr<int32_t>(order),
              .y = u.mutable_data_ptr(),
              .codes = mutable_ptr<int8_t>(codes),
              .qparams = qparams.view(),
              .directions = directions,
              .batch = batch,
              .tokens = tokens,
              .channels = channels,
              .taps = taps,
              .silu = true});
  return {cast_like(u, x), codes};
}

std::tuple<Tensor, Tensor> conv2d_quantize(Tensor x, Tensor weight, Optional bias, int64_t height, int64_t width,
                                           Tensor inv_scale, Tensor zero_point, Optional inv_smooth, int64_t bits) {
  check_axes("x", x, 3, "(B, H * W, E)"), check_axes("weight", weight, 3, "(E, rows, columns)");
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const int64_t kernel_rows = weight.size(1), columns = weight.size(2);
  PTQ4VM_CHECK(height >= 0 && width >= 0, "height and width must not be negative, they are ", height, " and ", width);
  PTQ4VM_CHECK(product("height and width", height, width) == tokens, "a map of height ", height, " and width ", width,
               " has not the ", tokens, " tokens of x");
  PTQ4VM_CHECK(kernel_rows % 2 == 1 && columns % 2 == 1, "a kernel of ", kernel_rows, " by ", columns,
               " has no middle: both must be odd");
  check_shape("weight", weight, {channels, kernel_rows, columns});
  check_shape("bias", bias, {channels});
  check_axes("inv_scale", inv_scale, 2, "(K, L) or (K, 1)");
  const int64_t directions = inv_scale.size(0);
  const OutputQParams qparams = qparams_of_directions(inv_scale, zero_point, inv_smooth, bits, directions, x);
  weight = floats("weight", weight), bias = floats("bias", bias);
  const Tensor input = as_rows("x", x);
  Tensor u = empty_result(0, x, input.scalar_type());
  Tensor codes = empty_result(1, x, {directions, batch, tokens, channels}, ScalarType::Char);
  run(x, Conv2d{.x = rows(input),
                .weight = const_ptr<float>(weight),
                .bias = const_ptr<float>(bias),
                .y = u.mutable_data_ptr(),
                .codes = mutable_ptr<int8_t>(codes),
                .qparams = qparams.view(),
                .directions = directions,
                .batch = batch,
                .height = height,
                .width = width,
                .channels = channels,
                .rows = kernel_rows,
                .columns = columns});
  return {cast_like(u, x), codes};
}

}  // namespace
}  // namespace ptq4vm

PTQ4VM_IMPL(causal_conv1d, "(" PTQ4VM_CONV ") -> Tensor", LIKE_INPUT)
PTQ4VM_IMPL(conv1d_quantize,
            "(Tensor x, Tensor weight, Tensor? bias, Tensor order, " PTQ4VM_QPARAMS ") -> (Tensor, Tensor)", LIKE_INPUT,
            INT8)
PTQ4VM_IMPL(conv2d_quantize,
            "(Tensor x, Tensor weight, Tensor? bias, int height, int width, " PTQ4VM_QPARAMS ") -> (Tensor, Tensor)",
            LIKE_INPUT, INT8)
