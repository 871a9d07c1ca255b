// The integer linears on a CPU: a plain weight is packed first, and then all go one way.
#include <cmath>
#include <memory>

#include "glue.h"

namespace ptq4vm {
namespace {

constexpr int64_t STEP = 64;  // channels of a tile, which are 16 by 16 output channels

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// So many rows that their codes stay in the second cache while all weights pass; fewer, where threads would be idle.
int64_t rows_in_block(const Linear& q) {
  constexpr int64_t BYTES = 768 << 10, MULTIPLE = 32;
  const int64_t threads = torch::stable::get_num_threads(), others = q.directions * q.feature_blocks();
  const int64_t for_threads = threads > 1 ? ceil_div(4 * threads, std::max<int64_t>(1, others)) : 1;
  const int64_t blocks = std::max(for_threads, ceil_div(q.rows * q.weight.channels, BYTES));
  return std::max<int64_t>(1, ceil_div(ceil_div(q.rows, blocks), MULTIPLE)) * MULTIPLE;
}

// So many that their results stay in the second cache until they are rotated; fewer, where threads would be idle.
int64_t rows_to_rotate(const Linear& q) {
  constexpr int64_t BYTES = 768 << 10, MULTIPLE = 32;
  const int64_t in_cache = BYTES / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, q.weight.features);
  const int64_t each = ceil_div(q.rows, torch::stable::get_num_threads());
  return std::max<int64_t>(1, std::min(in_cache / MULTIPLE, ceil_div(each, MULTIPLE))) * MULTIPLE;
}

void start(const Linear& q) {
  const auto kernel = kernels().linear;
  torch::stable::parallel_for(0, q.blocks(), 1, [&](int64_t begin, int64_t end) { kernel(q, begin, end); });
}

// The rows [begin, end) of a whole, which x begins with `begin`.
void rotate_rows(const RotateQuantize& whole, const float* x, int64_t begin, int64_t end) {
  const int64_t scales = whole.qparams.scales, channels = whole.rotation.channels;
  for (int64_t row = begin, count; row < end; row += count) {
    const int64_t token = row % scales;
    count = scales == 1 ? end - row : std::min(end - row, scales - token);
    RotateQuantize q = whole;
    q.x = x + (row - begin) * channels, q.codes += row * channels, q.rows = count;
    q.qparams.inv_scale += token, q.qparams.zero_point += token, q.qparams.scales -= token;
    kernels().rotate_quantize(q, 0, count);
  }
}

// The smallest magnitude, but for zeros; at most 1.
float smallest(const Tensor& x) {
  float least = 1.0f;
  for (const float *at = in<float>(x), *end = at + x.numel(); at < end; at++) {
    const float size = *at == 0.0f ? 1.0f : std::fabs(*at);
    least = size < least ? size : least;
  }
  return least;
}

// The inputs of one linear, or of K stacked ones, contiguous and of the types that kernels take.
struct LinearInputs {
  Tensor x, x_scale, zero_point, weight, sum, scale;
  Optional bias;
  bool stacked, nibbles;
  int64_t directions, rows = 1, scales, channels, features;

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
    const int64_t groups = ceil_div(features, LANES), steps = ceil_div(channels, STEP);
    const int64_t bytes = nibbles ? STEP / 2 : STEP;
    STD_TORCH_CHECK((nibbles || weight.scalar_type() == ScalarType::Char) && weight.dim() == 4 + stacked &&
                        weight.numel() == directions * groups * steps * LANES * bytes && weight.size(stacked) == groups,
                    "a weight of ", features, " × ", channels, " channels is packed into (", groups, ", ", steps,
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
    const int32_t *zero_points = in<int32_t>(zero_point), *end = zero_points + zero_point.numel();
    const auto not_code = std::find_if(zero_points, end, [](int32_t z) { return z != static_cast<int8_t>(z); });
    STD_TORCH_CHECK(not_code == end, "zero points are int8 codes, one is ", *not_code);
    STD_TORCH_CHECK(channels < 1 << 16, "sums of ", channels, " products of int8 codes may not fit int32");
    sum = as(sum, ScalarType::Int), scale = as(scale, ScalarType::Float), bias = as(bias, ScalarType::Float);
  }

  // What writes y, of the type that it has.
  Linear into(Tensor& y) const {
    Linear q{};
    q.x = in<int8_t>(x), q.x_scale = in<float>(x_scale), q.zero_point = in<int32_t>(zero_point);
    q.weight = {weight.const_data_ptr(), nibbles,  in<int32_t>(sum), in<float>(scale),
                in<float>(bias),         channels, features};
    q.y = y.mutable_data_ptr(), q.y_type = y.scalar_type() == ScalarType::BFloat16 ? Float::bf16 : Float::f32;
    // Then also sums with the bias are multiples of numbers that are not denormal.
    constexpr float LEAST = 0x1p-100f;
    q.normal = smallest(x_scale) * smallest(scale) > LEAST && (!bias || smallest(*bias) > LEAST);
    q.directions = directions, q.rows = rows, q.scales = scales;
    q.rows_in_block = rows_in_block(q);
    return q;
  }

  Tensor results(ScalarType type) const {
    const auto shape = with_last(x, features);
    return torch::stable::new_empty(x, {shape.data(), shape.size()}, type);
  }

  Tensor run(ScalarType type) const {
    Tensor y = results(type);
    start(into(y));
    return y;
  }

  Tensor run_gelu(const Qparams& qparams) const {
    Tensor codes = results(ScalarType::Char);
    Linear q = into(codes);
    q.gelu = qparams, q.gelu_codes = out<int8_t>(codes), q.y = nullptr;
    start(q);
    return codes;
  }

  // A block of rows at a time, whose results stay in the second cache until they are rotated.
  Tensor run_gelu_rotated(const Qparams& qparams) const {
    Tensor codes = results(ScalarType::Char);
    Linear q = into(codes);
    q.rows_in_block = rows_to_rotate(q);
    const RotationOf rotation(features);
    const RotateQuantize turn{nullptr, Float::f32, true, rotation.view(), out<int8_t>(codes), qparams, rows};
    const auto multiply = kernels().linear;
    torch::stable::parallel_for(0, q.row_blocks(), 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> y(new float[q.rows_in_block * features]);
      Linear part = q;
      part.y = y.get();
      for (int64_t block = begin; block < end; block++) {
        part.first_row = block * q.rows_in_block;
        multiply(part, block * q.feature_blocks(), (block + 1) * q.feature_blocks());
        rotate_rows(turn, y.get(), part.first_row, std::min(rows, part.first_row + q.rows_in_block));
      }
    });
    return codes;
  }

  // float32 and bfloat16 at once, others by way of float32
  Tensor run_as(ScalarType type) const {
    const Tensor y = run(type == ScalarType::BFloat16 ? type : ScalarType::Float);
    return y.scalar_type() == type ? y : torch::stable::to(y, type);
  }
};

Tensor linear_packed(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor sum, Tensor scale,
                     Optional bias, ScalarType type) {
  return LinearInputs(x, x_scale, zero_point, weight, sum, scale, bias).run_as(type);
}

Tensor linear(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor scale, Optional bias,
              ScalarType type) {
  const bool nibbles = weight.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK((nibbles || weight.scalar_type() == ScalarType::Char) && weight.dim() == 2 && x.dim() >= 1,
                  "the weight must be int8 (N, D), or uint8 (N, ceil(D / 2)) with two 4-bit codes a byte");
  const int64_t channels = x.size(x.dim() - 1), features = weight.size(0);
  const int64_t columns = nibbles ? ceil_div(channels, 2) : channels;
  STD_TORCH_CHECK(weight.size(1) == columns, "a ", nibbles ? "packed 4-bit" : "int8", " weight for ", channels,
                  " channels has ", columns, " columns, this one ", weight.size(1));
  check_shape("weight_scale", scale, {features});
  weight = as_contiguous(weight);
  const int64_t groups = ceil_div(features, LANES);
  Tensor tiles = make(weight, {groups, ceil_div(channels, STEP), LANES, STEP}, ScalarType::Char);
  Tensor sum = make(weight, {features}, ScalarType::Int);
  const Pack q{weight.const_data_ptr(), nibbles, out<int8_t>(tiles), out<int32_t>(sum), channels, features};
  const auto kernel = kernels().pack;
  torch::stable::parallel_for(0, groups, 4, [&](int64_t begin, int64_t end) { kernel(q, begin, end); });
  return LinearInputs(x, x_scale, zero_point, tiles, sum, scale, bias).run_as(type);
}

Tensor linear_gelu_quantize(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor sum, Tensor scale,
                            Optional bias, bool rotated, Tensor inv_scale, Tensor new_zero_point, Optional inv_smooth,
                            int64_t bits) {
  STD_TORCH_CHECK(2 <= bits && bits <= 8, "bits must be between 2 and 8, got ", bits);
  const LinearInputs linear(x, x_scale, zero_point, weight, sum, scale, bias);
  STD_TORCH_CHECK(!linear.stacked, "a GELU follows one linear, not ", linear.directions, " stacked ones");
  const int64_t scales = qparams(x, inv_scale);
  STD_TORCH_CHECK(new_zero_point.numel() == inv_scale.numel(), "there are ", inv_scale.numel(), " scales and ",
                  new_zero_point.numel(), " zero points");
  check_shape("inv_smooth", inv_smooth, {linear.features});
  inv_scale = as(inv_scale, ScalarType::Float), new_zero_point = as(new_zero_point, ScalarType::Int);
  inv_smooth = as(inv_smooth, ScalarType::Float);
  Qparams gelu{};
  gelu.inv_scale = in<float>(inv_scale), gelu.zero_point = in<int32_t>(new_zero_point);
  gelu.inv_smooth = in<float>(inv_smooth), gelu.scales = scales;
  gelu.low = -(1 << (bits - 1)), gelu.high = (1 << (bits - 1)) - 1;
  return rotated ? linear.run_gelu_rotated(gelu) : linear.run_gelu(gelu);
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CPU, m) {
  m.impl("linear", TORCH_BOX(&ptq4vm::linear));
  m.impl("linear_packed", TORCH_BOX(&ptq4vm::linear_packed));
  m.impl("linear_gelu_quantize", TORCH_BOX(&ptq4vm::linear_gelu_quantize));
}
