// The integer linears on a CPU: a plain weight is packed first, and then all go one way.
#include <cmath>
#include <memory>

#include "../bindings/linear_inputs.h"
#include "../bindings/run.h"
#include "kernels.h"

namespace ptq4vm {
namespace {

constexpr int64_t BYTES = 768 << 10, MULTIPLE = 32;  // of the second cache for a block of rows; of its rows

// So many rows that their codes stay in the second cache while all weights pass; fewer, where threads would be idle.
int64_t rows_in_block(const Linear& q) {
  const int64_t threads = get_num_threads(), others = q.directions * q.feature_blocks();
  const int64_t for_threads = threads > 1 ? divided_up(4 * threads, std::max<int64_t>(1, others)) : 1;
  const int64_t blocks = std::max(for_threads, divided_up(q.rows * q.weight.channels, BYTES));
  return std::max<int64_t>(1, divided_up(divided_up(q.rows, blocks), MULTIPLE)) * MULTIPLE;
}

// So many that their results stay in the second cache until they are rotated; fewer, where threads would be idle.
int64_t rows_to_rotate(const Linear& q) {
  const int64_t in_cache = BYTES / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, q.weight.features);
  const int64_t each = divided_up(q.rows, get_num_threads());
  return std::max<int64_t>(1, std::min(in_cache / MULTIPLE, divided_up(each, MULTIPLE))) * MULTIPLE;
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
    kernels().of(q)(q, 0, count);
  }
}

// The smallest magnitude, but for zeros; at most 1.
float smallest(const Tensor& x) {
  float least = 1.0f;
  for (const float *at = const_ptr<float>(x), *end = at + x.numel(); at < end; at++) {
    const float size = *at == 0.0f ? 1.0f : std::fabs(*at);
    least = size < least ? size : least;
  }
  return least;
}

// The packed weight: for a model that was fused for a GPU, which has it in rows, a copy.
Tensor tiles_of(const LinearInputs& i) {
  if (!i.in_rows) return i.weight;
  const int64_t row_bytes = i.nibbles ? i.padded / 2 : i.padded;
  Tensor tiles = empty_like(i.weight, {i.directions, groups(i.features), divided_up(i.channels, K_TILE), LANES, K_TILE},
                            ScalarType::Char);
  std::vector<int32_t> sums(i.features);
  for (int64_t k = 0; k < i.directions; k++) {
    run(i.weight, PackWeight{.weight = const_ptr<int8_t>(i.weight) + k * i.features * row_bytes,
                             .nibbles = i.nibbles,
                             .tiles = mutable_ptr<int8_t>(tiles) + k * (tiles.numel() / i.directions),
                             .sum = sums.data(),
                             .channels = i.padded,
                             .features = i.features});
  }
  return tiles;
}

// All but where results go; `tiles` is the packed weight.
Linear problem(const LinearInputs& i, const Tensor& tiles) {
  constexpr float LEAST = 0x1p-100f;  // then also sums with the bias are multiples of numbers that are not denormal
  Linear q{.x = const_ptr<int8_t>(i.x),
           .x_scale = const_ptr<float>(i.x_scale),
           .zero_point = const_ptr<int32_t>(i.zero_point),
           .weight = {.tiles = tiles.const_data_ptr(),
                      .nibbles = i.nibbles && !i.in_rows,
                      .sum = const_ptr<int32_t>(i.sum),
                      .scale = const_ptr<float>(i.scale),
                      .bias = const_ptr<float>(i.bias),
                      .channels = i.channels,
                      .features = i.features},
           .normal = smallest(i.x_scale) * smallest(i.scale) > LEAST && (!i.bias || smallest(*i.bias) > LEAST),
           .directions = i.directions,
           .rows = i.rows,
           .scales = i.scales};
  q.rows_in_block = rows_in_block(q);
  return q;
}

Tensor empty_results(const LinearInputs& i, ScalarType type) {
  return empty_result(0, i.x, with_channels(i.x, i.features), type);
}

}  // namespace

std::tuple<Tensor, Tensor> pack_plain_weight(const Tensor& weight, int64_t channels) {
  const int64_t features = weight.size(0);
  Tensor tiles = empty_like(weight, {groups(features), divided_up(channels, K_TILE), LANES, K_TILE}, ScalarType::Char);
  Tensor sum = empty_like(weight, {features}, ScalarType::Int);
  run(weight, PackWeight{.weight = weight.const_data_ptr(),
                         .nibbles = weight.scalar_type() == ScalarType::Byte,
                         .tiles = mutable_ptr<int8_t>(tiles),
                         .sum = mutable_ptr<int32_t>(sum),
                         .channels = channels,
                         .features = features});
  return {tiles, sum};
}

Tensor run_linear(const LinearInputs& i, ScalarType type) {
  const Tensor tiles = tiles_of(i);
  Tensor y = empty_results(i, type);
  Linear q = problem(i, tiles);
  q.y = y.mutable_data_ptr(), q.y_type = float_type(y);
  run(i.x, q);
  return y;
}

Tensor run_linear_gelu(const LinearInputs& i, const QParams& qparams) {
  const Tensor tiles = tiles_of(i);
  Tensor codes = empty_results(i, ScalarType::Char);
  Linear q = problem(i, tiles);
  q.gelu = qparams, q.gelu_codes = mutable_ptr<int8_t>(codes);
  run(i.x, q);
  return codes;
}

// A block of rows at a time, whose results stay in the second cache until they are rotated.
Tensor run_linear_gelu_rotated(const LinearInputs& i, const QParams& qparams) {
  const Tensor tiles = tiles_of(i);
  Tensor codes = empty_results(i, ScalarType::Char);
  Linear q = problem(i, tiles);
  q.y_type = Float::f32, q.rows_in_block = rows_to_rotate(q);
  const RotationMatrix rotation(i.features);
  const RotateQuantize rotated{.x = nullptr,
                               .x_type = Float::f32,
                               .gelu = true,
                               .rotation = rotation.view(),
                               .codes = mutable_ptr<int8_t>(codes),
                               .qparams = qparams,
                               .rows = i.rows};
  const auto multiply = kernels().of(q);
  parallel_for(0, q.row_blocks(), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> y(new float[q.rows_in_block * i.features]);
    Linear part = q;
    part.y = y.get();
    for (int64_t block = begin; block < end; block++) {
      part.first_row = block * q.rows_in_block;
      multiply(part, block * q.feature_blocks(), (block + 1) * q.feature_blocks());
      rotate_rows(rotated, y.get(), part.first_row, std::min(i.rows, part.first_row + q.rows_in_block));
    }
  });
  return codes;
}

}  // namespace ptq4vm
