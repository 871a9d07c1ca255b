// The work of a linear: blocks of rows by blocks of 64 output channels.
#pragma once

#include "linear_epilogue.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

thread_local Scratch row_memory, qparam_memory;

// A block of rows, of one direction.
struct RowBlock {
  int64_t direction = 0, first = 0, count = 0, stride = 0;
  const int8_t* x = nullptr;  // padded to whole tiles
  LinearRowQParams* rows = nullptr;

  void read(const Linear& q, int64_t block) {
    direction = block / q.row_blocks(), first = block % q.row_blocks() * q.rows_in_block;
    count = std::min(q.rows_in_block, q.rows - first);
    stride = round_up(q.weight.channels, K_TILE);
    x = q.x + (direction * q.rows + first) * q.weight.channels;
    if (stride != q.weight.channels) {
      auto* padded = row_memory.take<int8_t>(count * stride);
      for (int64_t r = 0; r < count; r++) {
        int8_t* to = padded + r * stride;
        std::copy_n(x + r * q.weight.channels, q.weight.channels, to);
        std::memset(to + q.weight.channels, 0, stride - q.weight.channels);
      }
      x = padded;
    }
    rows = qparam_memory.take<LinearRowQParams>(count);
    const auto at = [&](int64_t r, int64_t scales) { return direction * scales + (first + r) % scales; };
    for (int64_t r = 0; r < count; r++) {
      const int64_t i = at(r, q.scales);
      rows[r] = {zero_point_pair(q.zero_point[i]), q.x_scale[i], 0.0f, 0};
    }
    for (int64_t r = 0; q.gelu_codes && r < count; r++) {
      const int64_t i = at(r, q.gelu.scales);
      rows[r].inv_scale = q.gelu.inv_scale[i], rows[r].new_zero_point = q.gelu.zero_point[i];
    }
  }
};

// The part of q's weight that is one direction's.
inline PackedWeight one_direction(const Linear& q, int64_t direction) {
  PackedWeight w = q.weight;
  const int64_t tiles = groups(w.features) * divided_up(w.channels, K_TILE);
  w.tiles = static_cast<const uint8_t*>(w.tiles) + direction * tiles * (w.nibbles ? TILE_CODES / 2 : TILE_CODES);
  w.sum += direction * w.features;
  w.scale += direction * w.features;
  if (w.bias) w.bias += direction * w.features;
  return w;
}

// The output channels of an item of the work, which are next to one another in turn. Returns their codes.
inline const Code* read_features(FeatureParameters& f, const Linear& q, const RowBlock& block, int64_t item) {
  const PackedWeight w = one_direction(q, block.direction);
  const int64_t n = item % q.feature_blocks() * FEATURES_IN_BLOCK;
  f.read(w, q.gelu.inv_smooth, n, n + FEATURES_IN_BLOCK);
  return read_weight(w, n / TILE, (n + round_up(f.count, TILE)) / TILE);
}

template <class Out>
Out results(const Out& y, const Linear& q, const RowBlock& block, int64_t item) {
  return moved(y, block.direction * q.rows + block.first - q.first_row, item % q.feature_blocks() * FEATURES_IN_BLOCK);
}

// Calls run(output).
template <class Run>
void with_output(const Linear& q, const Run& run) {
  const int64_t stride = q.weight.features;
  if (q.gelu_codes) {
    run(CodesOutput{{q.gelu_codes, stride}, static_cast<float>(q.gelu.low), static_cast<float>(q.gelu.high)});
  } else if (q.y_type == Float::f32) {
    run(FloatOutput{{static_cast<float*>(q.y), stride}});
  } else {
    run(BFloat16Output{{static_cast<uint16_t*>(q.y), stride}});
  }
}

}  // namespace
}  // namespace ptq4vm::PTQ4VM_SET
