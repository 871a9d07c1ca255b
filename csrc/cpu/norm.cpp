// fused.norm_quantize: the sum with the residual, RMS norm or layer norm, and the codes, row by row in the first cache.
// Sums have one order, whatever the division of work; codes may differ from the reference's by one at rounding ties.
#include <cmath>
#include <vector>

#include "quantize.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

constexpr int SUMS = 4;  // at once: one alone would wait for itself

// Sum of term(value) over the row.
template <class Term>
float sum_of(const float* row, int64_t channels, Term term) {
  f32xw sums[SUMS] = {};
  int64_t d = 0;
  for (; d + SUMS * WIDTH <= channels; d += SUMS * WIDTH) {
    for (int i = 0; i < SUMS; i++) sums[i] += term(load_all(row + d + i * WIDTH));
  }
  for (; d + WIDTH <= channels; d += WIDTH) sums[0] += term(load_all(row + d));
  float rest = 0.0f;
  for (; d < channels; d++) rest += term(fill(row[d]))[0];
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <class T>
void rows(const NormQuantize& q, const T* input, int64_t begin, int64_t end) {
  const int64_t D = q.channels;
  const float share = 1.0f / static_cast<float>(D);
  std::vector<float> own(q.total ? 0 : D);
  for (int64_t r = begin; r < end; r++) {
    const T* x = input + r * D;
    float* row = q.total ? q.total + r * D : own.data();
    for (int64_t d = 0; d < D; d += WIDTH) {
      f32xw value = load_lanes(x + d, D - d);
      if (q.residual) value += load_lanes(q.residual + r * D + d, D - d);
      store_lanes(row + d, value, D - d);
    }
    const float mean = q.rms ? 0.0f : sum_of(row, D, [](f32xw x) { return x; }) * share;
    const float squares = sum_of(row, D, [mean](f32xw x) { return (x - mean) * (x - mean); });
    const float scale = 1.0f / std::sqrt(squares * share + q.eps);
    const Grid grid(q.qparams, r);
    for (int64_t d = 0; d < D; d += WIDTH) {
      f32xw y = (load_lanes(row + d, D - d) - mean) * scale;
      if (q.weight) y *= load_lanes(q.weight + d, D - d);
      if (q.bias) y += load_lanes(q.bias + d, D - d);
      if (q.qparams.inv_smooth) y *= load_lanes(q.qparams.inv_smooth + d, D - d);
      store_codes(q.codes + r * D + d, y, grid, D - d);
    }
  }
}

}  // namespace

void norm_quantize(const NormQuantize& q, int64_t begin, int64_t end) {
  if (q.x_type == Float::f32) {
    rows(q, static_cast<const float*>(q.x), begin, end);
  } else {
    rows(q, static_cast<const bfloat16*>(q.x), begin, end);
  }
}

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
