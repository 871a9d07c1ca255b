// What feeds a quantized linear: quantization, norms and convolutions with their codes. Checks, types and layouts, and
// memory for the results.
#include "run.h"

namespace ptq4vm {
namespace {

// Those of K directions: scales (K, L) or (K, 1), inv_smooth (K, E).
Codes codes_of_directions(const Tensor& inv, const Tensor& zero, const Optional& smooth, int64_t bits,
                          int64_t directions, int64_t tokens, int64_t channels) {
  PTQ4VM_CHECK(inv.dim() == 2 && inv.size(0) == directions, "scales of ", directions, " directions must be (",
               directions, ", L) or (", directions, ", 1), their shape is ", shape_text(inv.sizes()));
  PTQ4VM_CHECK(inv.size(1) == 1 || inv.size(1) == tokens, "token scales were calibrated for ", inv.size(1),
               " tokens, the input has ", tokens, "; calibrate at this resolution or use Granularity.PER_TENSOR");
  check_shape("inv_smooth", smooth, {directions, channels});
  return Codes(inv, zero, smooth, bits, std::max<int64_t>(1, inv.size(1)));
}

Tensor empty_as(const Tensor& x, ScalarType type) { return torch::stable::new_empty(x, x.sizes(), type); }

int64_t rows_of(const Tensor& x) {
  const int64_t channels = x.size(x.dim() - 1);
  return channels ? x.numel() / channels : 0;
}

Tensor quantize(Tensor x, Tensor inv_scale, Tensor zero_point, Optional inv_smooth, int64_t bits) {
  check_channels("x", x);
  const int64_t channels = x.size(x.dim() - 1);
  check_shape("inv_smooth", inv_smooth, {channels});
  const Codes codes(inv_scale, zero_point, inv_smooth, bits, qparams(x, inv_scale));
  const Input input(x);
  Tensor result = empty_as(x, ScalarType::Char);
  const Quantize q{input.data(), input.type, codes.view(), out<int8_t>(result), rows_of(x), channels};
  run(q, x);
  return result;
}

std::tuple<Tensor, Tensor> choose_qparams(Tensor x, Optional inv_smooth, int64_t bits) {
  check_bits(bits);
  check_channels("x", x);
  PTQ4VM_CHECK(x.size(x.dim() - 1) > 0, "x needs channels: no token has a range without them");
  const auto sizes = x.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  const int64_t channels = x.size(x.dim() - 1);
  check_shape("inv_smooth", inv_smooth, {channels});
  inv_smooth = floats("inv_smooth", inv_smooth);
  const Input input(x);
  Tensor scale = torch::stable::new_empty(x, {shape.data(), shape.size()}, ScalarType::Float);
  Tensor zero_point = torch::stable::new_empty(x, {shape.data(), shape.size()}, ScalarType::Int);
  const int low = lowest(bits);
  const ChooseQparams q{input.data(),
                        input.type,
                        in<float>(inv_smooth),
                        out<float>(scale),
                        out<int32_t>(zero_point),
                        rows_of(x),
                        channels,
                        low,
                        -low - 1};
  run(q, x);
  return {scale, zero_point};
}

Tensor dequantize(Tensor x_q, Tensor scale, Tensor zero_point) {
  check_codes("x_q", x_q, 1);
  check_zero_points("zero_point", zero_point, scale);
  const int64_t scales = qparams(x_q, scale), channels = x_q.size(x_q.dim() - 1);
  x_q = as_contiguous(x_q);
  scale = floats("scale", scale);
  zero_point = zero_points("zero_point", zero_point);
  Tensor y = empty_as(x_q, ScalarType::Float);
  const Dequantize q{in<int8_t>(x_q), in<float>(scale), in<int32_t>(zero_point), out<float>(y), rows_of(x_q), channels,
                     scales};
  run(q, x_q);
  return y;
}

Tensor rotate(Tensor x) {
  check_channels("x", x);
  const RotationOf rotation(x.size(x.dim() - 1));
  const Input input(x);
  Tensor y = empty_as(input.values, input.values.scalar_type());
  const Rotate q{input.data(), y.mutable_data_ptr(), input.type, rotation.view(), rows_of(x)};
  run(q, x);
  return typed(y, x);
}

Tensor rotate_quantize(Tensor x, bool gelu, Tensor inv_scale, Tensor zero_point, Optional inv_smooth, int64_t bits) {
  check_channels("x", x);
  const int64_t channels = x.size(x.dim() - 1);
  check_shape("inv_smooth", inv_smooth, {channels});
  const Codes codes(inv_scale, zero_point, inv_smooth, bits, qparams(x, inv_scale));
  const RotationOf rotation(channels);
  const Input input(x);
  Tensor result = empty_as(x, ScalarType::Char);
  const RotateQuantize q{input.data(),        input.type,   gelu,      rotation.view(),
                         out<int8_t>(result), codes.view(), rows_of(x)};
  run(q, x);
  return result;
}

std::tuple<Tensor, Tensor> norm_quantize(Tensor x, Optional residual, Optional weight, Optional bias, double eps,
                                         bool rms, bool rotated, Tensor inv_scale, Tensor zero_point,
                                         Optional inv_smooth, int64_t bits) {
  check_channels("x", x);
  const int64_t channels = x.size(x.dim() - 1);
  if (residual) check_sizes("residual", *residual, x.sizes());
  check_shape("weight", weight, {channels});
  check_shape("bias", bias, {channels});
  check_shape("inv_smooth", inv_smooth, {channels});
  PTQ4VM_CHECK(!rms || !bias, "an RMS norm has no bias");
  const Codes codes(inv_scale, zero_point, inv_smooth, bits, qparams(x, inv_scale));
  residual = floats("residual", residual);
  weight = floats("weight", weight);
  bias = floats("bias", bias);
  const RotationOf matrix(channels);
  const Rotation rotation = matrix.view();
  const Input input(x);
  Tensor result = empty_as(x, ScalarType::Char);
  Tensor total = residual ? empty_as(x, ScalarType::Float) : make(x, {0}, ScalarType::Float);
  const NormQuantize q{input.data(),
                       input.type,
                       in<float>(residual),
                       in<float>(weight),
                       in<float>(bias),
                       residual ? out<float>(total) : nullptr,
                       out<int8_t>(result),
                       codes.view(),
                       rows_of(x),
                       channels,
                       static_cast<float>(eps),
                       rms,
                       rotated ? &rotation : nullptr};
  run(q, x);
  return {total, result};
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
  const Codes codes = codes_of_directions(inv_scale, zero_point, inv_smooth, bits, directions, tokens, channels);
  order = orders(order, tokens, true);
  weight = floats("weight", weight);
  bias = floats("bias", bias);
  const Input input(x, true);
  Tensor u = make(input.values, {directions, batch, tokens, channels}, input.values.scalar_type());
  Tensor result = make(x, {directions, batch, tokens, channels}, ScalarType::Char);
  const Conv q{input.data(),
               input.type,
               input.values.stride(0),
               input.values.stride(1),
               in<float>(weight),
               in<float>(bias),
               in<int32_t>(order),
               u.mutable_data_ptr(),
               out<int8_t>(result),
               codes.view(),
               directions,
               batch,
               tokens,
               channels,
               taps,
               true};
  run(q, x);
  return {typed(u, x), result};
}

std::tuple<Tensor, Tensor> conv2d_quantize(Tensor x, Tensor weight, Optional bias, int64_t height, int64_t width,
                                           Tensor inv_scale, Tensor zero_point, Optional inv_smooth, int64_t bits) {
  check_axes("x", x, 3, "(B, H * W, E)"), check_axes("weight", weight, 3, "(E, rows, columns)");
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const int64_t rows = weight.size(1), columns = weight.size(2);
  PTQ4VM_CHECK(height >= 0 && width >= 0, "height and width must not be negative, they are ", height, " and ", width);
  PTQ4VM_CHECK(product("height and width", height, width) == tokens, "a map of height ", height, " and width ", width,
               " has not the ", tokens, " tokens of x");
  PTQ4VM_CHECK(rows % 2 == 1 && columns % 2 == 1, "a kernel of ", rows, " by ", columns,
               " has no middle: both must be odd");
  check_shape("weight", weight, {channels, rows, columns});
  check_shape("bias", bias, {channels});
  check_axes("inv_scale", inv_scale, 2, "(K, L) or (K, 1)");
  const int64_t directions = inv_scale.size(0);
  const Codes codes = codes_of_directions(inv_scale, zero_point, inv_smooth, bits, directions, tokens, channels);
  weight = floats("weight", weight);
  bias = floats("bias", bias);
  const Input input(x, true);
  Tensor u = make(input.values, {batch, tokens, channels}, input.values.scalar_type());
  Tensor result = make(x, {directions, batch, tokens, channels}, ScalarType::Char);
  const Conv2d q{input.data(),
                 input.type,
                 input.values.stride(0),
                 input.values.stride(1),
                 in<float>(weight),
                 in<float>(bias),
                 u.mutable_data_ptr(),
                 out<int8_t>(result),
                 codes.view(),
                 directions,
                 batch,
                 height,
                 width,
                 channels,
                 rows,
                 columns};
  run(q, x);
  return {typed(u, x), result};
}

Tensor causal_conv1d(Tensor x, Tensor weight, Optional bias, bool silu) {
  check_conv(x, weight, bias);
  if (x.scalar_type() == ScalarType::Double) return causal_conv1d_in_float64(x, weight, bias, silu);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  weight = floats("weight", weight);
  bias = floats("bias", bias);
  const Input input(x, true);
  Tensor y = make(x, {batch, tokens, channels}, input.values.scalar_type());
  const Conv q{input.data(),
               input.type,
               input.values.stride(0),
               input.values.stride(1),
               in<float>(weight),
               in<float>(bias),
               nullptr,
               y.mutable_data_ptr(),
               nullptr,
               {},
               1,
               batch,
               tokens,
               channels,
               weight.size(1),
               silu};
  run(q, x);
  return typed(y, x);
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(PTQ4VM_LIBRARY, PTQ4VM_KEY, m) {
  PTQ4VM_IMPL(m, quantize);
  PTQ4VM_IMPL(m, choose_qparams);
  PTQ4VM_IMPL(m, dequantize);
  PTQ4VM_IMPL(m, rotate);
  PTQ4VM_IMPL(m, rotate_quantize);
  PTQ4VM_IMPL(m, norm_quantize);
  PTQ4VM_IMPL(m, conv1d_quantize);
  PTQ4VM_IMPL(m, conv2d_quantize);
  PTQ4VM_IMPL(m, causal_conv1d);
}
