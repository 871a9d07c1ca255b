// ops.norm_quantize: the sum with the residual, RMS norm or layer norm, a rotation, and the codes, row by row in the
// first cache. Sums have one order, whatever the division of work; codes may differ from the reference's by one at
// rounding ties.
#include <algorithm>
#include <cmath>
#include <vector>

#include "quantize.h"
#include "rotate.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

constexpr int SUMS = 4;  // at once: one alone would wait for itself

// Σ term(d, count) over vectors of `count` channels from d on. Terms of lanes beyond the channels must be zero.
template <class Term>
inline float sum_of(int64_t channels, Term term) {
  f32xw sums[SUMS] = {};
  int64_t d = 0;
  for (; d + SUMS * WIDTH <= channels; d += SUMS * WIDTH) {
    for (int i = 0; i < SUMS; i++) sums[i] += term(d + i * WIDTH, WIDTH);
  }
  for (; d < channels; d += WIDTH) sums[0] += term(d, std::min(WIDTH, channels - d));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void rows(const NormQuantize& q, const T* input, int64_t begin, int64_t end) {
  const int64_t D = q.channels;
  const float share = 1.0f / static_cast<float>(D), eps = q.eps;
  const bool rms = q.rms;
  std::vector<float> own(q.total ? 0 : D), ones(WIDTH, 1.0f);
  AlignedRow turned(q.rotation ? D : 0);
  for (int64_t r = begin; r < end; r++) {
    const T* x = input + r * D;
    const float *residual = q.residual ? q.residual + r * D : nullptr, *one = ones.data();
    float* row = q.total ? q.total + r * D : own.data();
    const float first = sum_of(D, [=](int64_t d, int64_t count) {
      f32xw value = load_lanes(x + d, count);
      if (residual) value += load_lanes(residual + d, count);
      store_lanes(row + d, value, count);
      return rms ? value * value : value;
    });
    const float mean = rms ? 0.0f : first * share;
    const auto deviation = [=](int64_t d, int64_t count) {
      const f32xw value = (load_lanes(row + d, count) - mean) * load_lanes(one, count);
      return value * value;
    };
    const float squares = rms ? first : sum_of(D, deviation);
    const float scale = 1.0f / std::sqrt(squares * share + eps);
    const RowQParams qparams(q.qparams, r);
    const float *weight = q.weight, *bias = q.bias, *inv_smooth = q.qparams.inv_smooth;
    int8_t* codes = q.codes + r * D;
    const auto write = [=](int64_t d, f32xw y, int64_t count) { store_codes(codes + d, y, qparams, count); };
    const auto smoothed = [=](int64_t d) {
      f32xw y = (load_lanes(row + d, D - d) - mean) * scale;
      if (weight) y *= load_lanes(weight + d, D - d);
      if (bias) y += load_lanes(bias + d, D - d);
      if (inv_smooth) y *= load_lanes(inv_smooth + d, D - d);
      return y;
    };
    if (q.rotation) {
      for (int64_t d = 0; d < D; d += WIDTH) store_lanes(turned.data() + d, smoothed(d), D - d);
      rotate_row(*q.rotation, turned.data(), write);
    } else {
      for (int64_t d = 0; d < D; d += WIDTH) write(d, smoothed(d), D - d);
    }
  }
}

}  // namespace

void run(const NormQuantize& q, int64_t begin, int64_t end) {
  with_type(q.x_type, [&](auto t) { rows(q, static_cast<const decltype(t)*>(q.x), begin, end); });
}

}  // namespace ptq4vm::PTQ4VM_SET
