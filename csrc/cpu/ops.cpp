// The operators on a CPU: checks, types and layouts, memory for the results, and the kernels in parallel.
// A float64 scan or convolution runs in plain loops; every other floating type is computed in float32.
#include "float64.h"
#include "glue.h"

namespace ptq4vm {
namespace {

Tensor quantize(Tensor x, Tensor inv_scale, Tensor zero_point, Optional inv_smooth, int64_t bits) {
  STD_TORCH_CHECK(2 <= bits && bits <= 8, "bits must be between 2 and 8, got ", bits);
  STD_TORCH_CHECK(x.dim() >= 1, "x needs a channel axis");
  const int64_t scales = qparams(x, inv_scale), channels = x.size(x.dim() - 1);
  STD_TORCH_CHECK(zero_point.numel() == inv_scale.numel(), "there are ", inv_scale.numel(), " scales and ",
                  zero_point.numel(), " zero points");
  check_shape("inv_smooth", inv_smooth, {channels});
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  x = as(x, half ? ScalarType::BFloat16 : ScalarType::Float);
  inv_scale = as(inv_scale, ScalarType::Float);
  zero_point = as(zero_point, ScalarType::Int);
  inv_smooth = as(inv_smooth, ScalarType::Float);
  const auto shape = with_last(x, channels);
  Tensor codes = torch::stable::new_empty(x, {shape.data(), shape.size()}, ScalarType::Char);
  const int64_t rows = channels ? x.numel() / channels : 0;
  const int half_range = 1 << (bits - 1);
  const Quantize q{x.const_data_ptr(),     half ? Float::bf16 : Float::f32, in<float>(inv_scale), in<int32_t>(zero_point),
                   in<float>(inv_smooth),  out<int8_t>(codes),              rows,                 channels,
                   scales,                 -half_range,                     half_range - 1};
  const auto run = kernels().quantize;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, channels)),
                              [&](int64_t begin, int64_t end) { run(q, begin, end); });
  return codes;
}

Tensor linear(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Optional bias,
              ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char && x.dim() >= 1, "x must be int8 codes with a channel axis");
  const bool packed = weight.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK((packed || weight.scalar_type() == ScalarType::Char) && weight.dim() == 2,
                  "the weight must be int8 (N, D), or uint8 (N, ceil(D / 2)) with two 4-bit codes a byte");
  const int64_t scales = qparams(x, x_scale), channels = x.size(x.dim() - 1), features = weight.size(0);
  const int64_t columns = packed ? (channels + 1) / 2 : channels;
  STD_TORCH_CHECK(weight.size(1) == columns, "a ", packed ? "packed 4-bit" : "int8", " weight for ", channels,
                  " channels has ", columns, " columns, this one ", weight.size(1));
  STD_TORCH_CHECK(zero_point.numel() == x_scale.numel(), "there are ", x_scale.numel(), " scales and ",
                  zero_point.numel(), " zero points");
  check_shape("weight_scale", weight_scale, {features});
  check_shape("bias", bias, {features});
  x = torch::stable::contiguous(x);
  weight = torch::stable::contiguous(weight);
  x_scale = as(x_scale, ScalarType::Float);
  zero_point = as(zero_point, ScalarType::Int);
  weight_scale = as(weight_scale, ScalarType::Float);
  bias = as(bias, ScalarType::Float);
  const bool half = type == ScalarType::BFloat16;
  const auto shape = with_last(x, features);
  Tensor y = torch::stable::new_empty(x, {shape.data(), shape.size()}, half ? ScalarType::BFloat16 : ScalarType::Float);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) rows *= x.size(i);
  const Linear q{in<int8_t>(x), in<float>(x_scale),     in<int32_t>(zero_point),         weight.const_data_ptr(), packed,
                 in<float>(weight_scale), in<float>(bias), y.mutable_data_ptr(), half ? Float::bf16 : Float::f32,
                 rows,          channels,               features,                        scales};
  const auto run = kernels().linear;
  const int64_t row_blocks = (rows + ROWS_IN_BLOCK - 1) / ROWS_IN_BLOCK;
  const int64_t feature_blocks = (features + FEATURES_IN_BLOCK - 1) / FEATURES_IN_BLOCK;
  torch::stable::parallel_for(0, row_blocks * feature_blocks, 1,
                              [&](int64_t begin, int64_t end) { run(q, begin, end); });
  return y.scalar_type() == type ? y : torch::stable::to(y, type);
}

Tensor sum_images(const Tensor& x) {
  const int64_t axis = 0;
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&axis, 1));
}

struct ConvInputs {
  Tensor x, weight;
  Optional bias;
  int64_t batch, tokens, channels, taps;
  ScalarType type;

  ConvInputs(const Tensor& x_, const Tensor& weight_, const Optional& bias_) : x(x_), weight(weight_), bias(bias_) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x must be (B, L, E) and the weight (E, K)");
    batch = x.size(0), tokens = x.size(1), channels = x.size(2), taps = weight.size(1);
    STD_TORCH_CHECK(taps >= 1, "a convolution needs at least one tap");
    check_shape("weight", weight, {channels, taps});
    check_shape("bias", bias, {channels});
    type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    x = as(x, type), weight = as(weight, type), bias = as(bias, type);
  }
};

Tensor causal_conv1d(Tensor x, Tensor weight, Optional bias, bool silu) {
  const ConvInputs c(x, weight, bias);
  Tensor y = make(c.x, {c.batch, c.tokens, c.channels}, c.type);
  if (c.type == ScalarType::Double) {
    float64::conv({in<double>(c.x), in<double>(c.weight), in<double>(c.bias), c.batch, c.tokens, c.channels, c.taps, silu},
                  out<double>(y));
  } else {
    const Conv q{in<float>(c.x), in<float>(c.weight), in<float>(c.bias), out<float>(y), c.batch,
                 c.tokens,       c.channels,          c.taps,            silu};
    const auto run = kernels().conv;
    torch::stable::parallel_for(0, c.batch * groups(c.channels), 1,
                                [&](int64_t begin, int64_t end) { run(q, begin, end); });
  }
  return typed(y, x);
}

std::tuple<Tensor, Tensor, Tensor> causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight, Optional bias, bool silu) {
  const ConvInputs c(x, weight, bias);
  check_shape("grad", grad, {c.batch, c.tokens, c.channels});
  const ScalarType grad_type = grad.scalar_type();
  grad = as(grad, c.type);
  Optional dbias;
  Tensor dx, dweight;
  if (c.type == ScalarType::Double) {
    dx = zeros(c.x, {c.batch, c.tokens, c.channels}, c.type);
    dweight = zeros(c.x, {c.channels, c.taps}, c.type);
    if (bias) dbias = zeros(c.x, {c.channels}, c.type);
    float64::conv_backward(
        {in<double>(c.x), in<double>(c.weight), in<double>(c.bias), c.batch, c.tokens, c.channels, c.taps, silu},
        in<double>(grad), out<double>(dx), out<double>(dweight), out<double>(dbias));
  } else {
    dx = make(c.x, {c.batch, c.tokens, c.channels}, c.type);
    dweight = make(c.x, {c.batch, c.channels, c.taps}, c.type);
    if (bias) dbias = make(c.x, {c.batch, c.channels}, c.type);
    const ConvBackward q{{in<float>(c.x), in<float>(c.weight), in<float>(c.bias), nullptr, c.batch, c.tokens, c.channels,
                          c.taps, silu},
                         in<float>(grad),
                         out<float>(dx),
                         out<float>(dweight),
                         out<float>(dbias)};
    const auto run = kernels().conv_backward;
    torch::stable::parallel_for(0, c.batch * groups(c.channels), 1,
                                [&](int64_t begin, int64_t end) { run(q, begin, end); });
    dweight = sum_images(dweight);
    if (dbias) dbias = sum_images(*dbias);
  }
  return {typed(dx, x), typed(dweight, weight), bias ? typed(*dbias, *bias) : make(c.x, {0}, grad_type)};
}

// Chooses an instruction set for what follows, at most the best one ("" chooses none); gives the one in use.
std::string use_isa_named(std::string wanted) {
  for (int i = 0; i <= static_cast<int>(best_isa()); i++) {
    if (wanted == name(static_cast<Isa>(i))) use_isa(static_cast<Isa>(i));
  }
  return name(isa());
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CPU, m) {
  m.impl("quantize", TORCH_BOX(&ptq4vm::quantize));
  m.impl("linear", TORCH_BOX(&ptq4vm::linear));
  m.impl("causal_conv1d", TORCH_BOX(&ptq4vm::causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&ptq4vm::causal_conv1d_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CompositeExplicitAutograd, m) {
  m.impl("_use_isa", TORCH_BOX(&ptq4vm::use_isa_named));
}
