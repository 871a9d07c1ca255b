// ops.rotate of a row in the first cache: Hadamard's transform by butterflies between registers, then Hartley's
// small one. Files that include this allow contraction.
#pragma once

#include <utility>
#include <vector>

#include "kernels.h"
#include "math.h"

namespace ptq4vm {
namespace {

constexpr int MAX_REGISTERS = 8;  // registers that one pass over a row transforms together

// Lanes whose numbers differ in the bit H become their sum and their difference.
template <int H, int... lane>
inline f32xw butterfly(f32xw v, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  const f32xw other = __builtin_shufflevector(v, v, (lane ^ H)...);
#else
  const f32xw other = __builtin_shuffle(v, i32xw{(lane ^ H)...});
#endif
  return other + f32xw{(lane & H ? -1.0f : 1.0f)...} * v;
}

template <int H = 1>
inline f32xw transform_lanes(f32xw v) {
  if constexpr (H < WIDTH) {
    return transform_lanes<2 * H>(butterfly<H>(v, std::make_integer_sequence<int, WIDTH>()));
  } else {
    return v;
  }
}

template <int COUNT>
inline void transform_registers(f32xw (&v)[COUNT]) {
  for (int half = 1; half < COUNT; half *= 2) {
    for (int i = 0; i < COUNT; i++) {
      if (i & half) continue;
      const f32xw a = v[i], b = v[i | half];
      v[i] = a + b;
      v[i | half] = a - b;
    }
  }
}

// In every run of COUNT * half channels, those that are whole multiples of half apart; also those within a register.
template <int COUNT, bool LANES_TOO>
void pass(float* x, int64_t channels, int64_t half) {
  for (int64_t run = 0; run < channels; run += COUNT * half) {
    for (int64_t d = run; d < run + half; d += WIDTH) {
      f32xw v[COUNT];
      for (int i = 0; i < COUNT; i++) {
        v[i] = load_all(x + d + i * half);
        if (LANES_TOO) v[i] = transform_lanes(v[i]);
      }
      transform_registers(v);
      for (int i = 0; i < COUNT; i++) store_all(x + d + i * half, v[i]);
    }
  }
}

template <bool LANES_TOO>
int64_t pass_of(int64_t count, float* x, int64_t channels, int64_t half) {
  if (count >= MAX_REGISTERS) return pass<MAX_REGISTERS, LANES_TOO>(x, channels, half), MAX_REGISTERS;
  if (count >= 4) return pass<4, LANES_TOO>(x, channels, half), 4;
  if (count >= 2) return pass<2, LANES_TOO>(x, channels, half), 2;
  return pass<1, LANES_TOO>(x, channels, half), 1;
}

void hadamard(float* x, int64_t channels, int64_t order) {
  if (order % WIDTH == 0) {
    int64_t half = WIDTH * pass_of<true>(order / WIDTH, x, channels, WIDTH);
    while (half < order) half *= pass_of<false>(order / half, x, channels, half);
    return;
  }
  for (int64_t half = 1; half < order; half *= 2) {
    for (int64_t d = 0; d < channels; d++) {
      if (d & half) continue;
      const float a = x[d], b = x[d + half];
      x[d] = a + b;
      x[d + half] = a - b;
    }
  }
}

// Memory in which a row is transformed, at a vector's alignment: a vector across two lines of the cache takes twice as
// long.
class AlignedRow {
 public:
  explicit AlignedRow(int64_t channels) : lines_((channels + 15) / 16) {}
  float* data() { return reinterpret_cast<float*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    float lanes[16];
  };
  std::vector<Line> lines_;
};

// The products with Hartley's matrix of `size` rows, of which most models have three.
template <int SIZE, class Emit>
inline void mix(const float* matrix, int64_t size, int64_t order, float factor, const float* x, Emit emit) {
  if (SIZE) size = SIZE;
  float factors[SIZE ? SIZE : MAX_HARTLEY];  // which no store of codes can change
  for (int64_t j = 0; j < size; j++) {
    for (int64_t k = 0; k < size; k++) factors[k] = matrix[j * size + k];
    for (int64_t i = 0; i < order; i += WIDTH) {
      f32xw total = factors[0] * load_lanes(x + i, order - i);
      for (int64_t k = 1; k < size; k++) total += factors[k] * load_lanes(x + k * order + i, order - i);
      emit(j * order + i, total * factor, order - i);
    }
  }
}

// Transforms a row in place, and hands the result to emit(d, value, count).
template <class Emit>
inline void rotate_row(Rotation q, float* x, Emit emit) {
  const int64_t D = q.channels;
  hadamard(x, D, q.order);
  if (!q.matrix) {
    for (int64_t d = 0; d < D; d += WIDTH) emit(d, load_lanes(x + d, D - d) * q.factor, D - d);
  } else if (D == 3 * q.order) {
    mix<3>(q.matrix, 3, q.order, q.factor, x, emit);
  } else {
    mix<0>(q.matrix, D / q.order, q.order, q.factor, x, emit);
  }
}

}  // namespace
}  // namespace ptq4vm
