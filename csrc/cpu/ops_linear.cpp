// The integer linears on a CPU: a plain weight is packed first, and then all go one way.
#include <cmath>
#include <memory>

#include "../linear_inputs.h"
#include "kernels.h"

namespace ptq4vm {
namespace {

constexpr int64_t BYTES = 768 << 10, MULTIPLE = 32;  // of the second cache for a block of rows; of its rows

// So many rows that their codes stay in the second cache while all weights pass; fewer, where threads would be idle.
int64_t rows_in_block(const Linear& q) {
  const int64_t threads = torch::stable::get_num_threads(), others = q.directions * q.feature_blocks();
  const int64_t for_threads = threads > 1 ? divided_up(4 * threads, std::max<int64_t>(1, others)) : 1;
  const int64_t blocks = std::max(for_threads, divided_up(q.rows * q.weight.channels, BYTES));
  return std::max<int64_t>(1, divided_up(divided_up(q.rows, blocks), MULTIPLE)) * MULTIPLE;
}

// So many that their results stay in the second cache until they are rotated; fewer, where threads would be idle.
int64_t rows_to_rotate(const Linear& q) {
  const int64_t in_cache = BYTES / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, q.weight.features);
  const int64_t each = divided_up(q.rows, torch::stable::get_num_threads());
  return std::max<int64_t>(1, std::min(in_cache / MULTIPLE, divided_up(each, MULTIPLE))) * MULTIPLE;
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

// Packs a plain weight of one linear: (N, channels) int8, or nibbles. Gives also the sums of its codes.
void pack(const void* weight, bool nibbles, int64_t channels, int64_t features, int8_t* tiles, int32_t* sum) {
  const Pack q{weight, nibbles, tiles, sum, channels, features};
  const auto kernel = kernels().pack;
  torch::stable::parallel_for(0, groups(features), 4, [&](int64_t begin, int64_t end) { kernel(q, begin, end); });
}

// The weight of a model that was fused for a GPU.
Tensor tiled(const LinearInputs& i) {
  const int64_t count = groups(i.features), steps = divided_up(i.channels, STEP);
  Tensor tiles = make(i.weight, {i.directions, count, steps, LANES, STEP}, ScalarType::Char);
  std::vector<int32_t> sums(i.features);
  for (int64_t k = 0; k < i.directions; k++) {
    const int64_t bytes = i.features * (i.nibbles ? i.padded / 2 : i.padded);
    pack(in<int8_t>(i.weight) + k * bytes, i.nibbles, i.padded, i.features,
         out<int8_t>(tiles) + k * count * steps * LANES * STEP, sums.data());
  }
  return tiles;
}

// All but where results go; `tiles` is the packed weight.
Linear problem(const LinearInputs& i, const Tensor& tiles) {
  Linear q{};
  q.x = in<int8_t>(i.x), q.x_scale = in<float>(i.x_scale), q.zero_point = in<int32_t>(i.zero_point);
  q.weight = {tiles.const_data_ptr(),
              i.nibbles && !i.in_rows,
              in<int32_t>(i.sum),
              in<float>(i.scale),
              in<float>(i.bias),
              i.channels,
              i.features};
  // Then also sums with the bias are multiples of numbers that are not denormal.
  constexpr float LEAST = 0x1p-100f;
  q.normal = smallest(i.x_scale) * smallest(i.scale) > LEAST && (!i.bias || smallest(*i.bias) > LEAST);
  q.directions = i.directions, q.rows = i.rows, q.scales = i.scales;
  q.rows_in_block = rows_in_block(q);
  return q;
}

Tensor tiles_of(const LinearInputs& i) { return i.in_rows ? tiled(i) : i.weight; }

Tensor results(const LinearInputs& i, ScalarType type) {
  const auto shape = with_last(i.x, i.features);
  return torch::stable::new_empty(i.x, {shape.data(), shape.size()}, type);
}

// float32 and bfloat16 at once, others by way of float32
Tensor run_as(const LinearInputs& i, ScalarType type) {
  const Tensor tiles = tiles_of(i);
  Tensor y = results(i, has_kernels(type) ? type : ScalarType::Float);
  Linear q = problem(i, tiles);
  q.y = y.mutable_data_ptr(), q.y_type = float_type(y);
  start(q);
  return y.scalar_type() == type ? y : torch::stable::to(y, type);
}

Tensor run_gelu(const LinearInputs& i, const Qparams& qparams) {
  const Tensor tiles = tiles_of(i);
  Tensor codes = results(i, ScalarType::Char);
  Linear q = problem(i, tiles);
  q.gelu = qparams, q.gelu_codes = out<int8_t>(codes);
  start(q);
  return codes;
}

// A block of rows at a time, whose results stay in the second cache until they are rotated.
Tensor run_gelu_rotated(const LinearInputs& i, const Qparams& qparams) {
  const Tensor tiles = tiles_of(i);
  Tensor codes = results(i, ScalarType::Char);
  Linear q = problem(i, tiles);
  q.y_type = Float::f32, q.rows_in_block = rows_to_rotate(q);
  const RotationOf rotation(i.features);
  const RotateQuantize turn{nullptr, Float::f32, true, rotation.view(), out<int8_t>(codes), qparams, i.rows};
  const auto multiply = kernels().linear;
  torch::stable::parallel_for(0, q.row_blocks(), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> y(new float[q.rows_in_block * i.features]);
    Linear part = q;
    part.y = y.get();
    for (int64_t block = begin; block < end; block++) {
      part.first_row = block * q.rows_in_block;
      multiply(part, block * q.feature_blocks(), (block + 1) * q.feature_blocks());
      rotate_rows(turn, y.get(), part.first_row, std::min(i.rows, part.first_row + q.rows_in_block));
    }
  });
  return codes;
}

Tensor linear_packed(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor sum, Tensor scale,
                     Optional bias, ScalarType type) {
  check_out_dtype(type);
  return run_as(LinearInputs(x, x_scale, zero_point, weight, sum, scale, bias), type);
}

Tensor linear(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor scale, Optional bias,
              ScalarType type) {
  check_out_dtype(type), check_plain_weight(x, weight, scale);
  const int64_t channels = x.size(x.dim() - 1), features = weight.size(0);
  weight = as_contiguous(weight);
  Tensor tiles = make(weight, {groups(features), divided_up(channels, STEP), LANES, STEP}, ScalarType::Char);
  Tensor sum = make(weight, {features}, ScalarType::Int);
  pack(weight.const_data_ptr(), weight.scalar_type() == ScalarType::Byte, channels, features, out<int8_t>(tiles),
       out<int32_t>(sum));
  return run_as(LinearInputs(x, x_scale, zero_point, tiles, sum, scale, bias), type);
}

Tensor linear_gelu_quantize(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor sum, Tensor scale,
                            Optional bias, bool rotated, Tensor inv_scale, Tensor new_zero_point, Optional inv_smooth,
                            int64_t bits) {
  const LinearInputs linear(x, x_scale, zero_point, weight, sum, scale, bias);
  const Codes codes = gelu_codes(linear, inv_scale, new_zero_point, inv_smooth, bits);
  return rotated ? run_gelu_rotated(linear, codes.view()) : run_gelu(linear, codes.view());
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(PTQ4VM_LIBRARY, PTQ4VM_KEY, m) {
  PTQ4VM_IMPL(m, linear);
  PTQ4VM_IMPL(m, linear_packed);
  PTQ4VM_IMPL(m, linear_gelu_quantize);
}
