// The arguments of the CPU's linears, whose weights are packed for it.
#pragma once

#include "../operators.h"

namespace ptq4vm {

constexpr int64_t FEATURES_IN_BLOCK = 64;

// layouts.pack_weight: tiles [ceil(N / 16)][ceil(D / 64)][16][64] int8, or [16][32] bytes of two 4-bit codes.
struct PackedWeight {
  const void* tiles;
  bool nibbles;
  const int32_t* sum;  // (N,) of each row's codes
  const float* scale;  // (N,)
  const float* bias;   // (N,) or null
  int64_t channels, features;
};

// Packs a plain weight: int8 (N, D), or two 4-bit codes a byte (N, ceil(D / 2)).
struct PackWeight {
  const void* weight;
  bool nibbles;
  int8_t* tiles;
  int32_t* sum;  // (N,)
  int64_t channels, features;
};

// ops.linear_packed: x (K, rows, D), qparams (K, scales), weights and y one direction after the other. With
// gelu_codes, ops.linear_gelu_quantize: those are written, and not y.
struct Linear {
  const int8_t* x;
  const float* x_scale;
  const int32_t* zero_point;
  PackedWeight weight;
  void* y = nullptr;
  Float y_type = Float::f32;
  bool normal;                   // no result but zero is so small that float32 has it denormal
  int8_t* gelu_codes = nullptr;  // or null
  QParams gelu = {};
  int64_t directions, rows, scales;
  int64_t rows_in_block = 32;  // a multiple of 32
  int64_t first_row = 0;       // of x, whose results are y's first

  int64_t row_blocks() const { return divided_up(rows, rows_in_block); }
  int64_t feature_blocks() const { return divided_up(weight.features, FEATURES_IN_BLOCK); }
  int64_t blocks() const { return directions * row_blocks() * feature_blocks(); }
};

}  // namespace ptq4vm
