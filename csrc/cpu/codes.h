// reference.quantize of one row, for the kernels whose results are codes.
#pragma once

#include "math.h"

namespace ptq4vm {
namespace {

// Beyond FAR every value is clamped whatever the zero point, and below it rounding by addition is exact.
constexpr float FAR = 1024.0f, MAGIC = 12582912.0f;  // 1.5 * 2^23

inline float widened(float x) { return x; }

inline float widened(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float clamped(float x, float low, float high) {
  x = low > x ? low : x;
  return high < x ? high : x;
}

// One row; a plain loop, which compilers turn into whatever vectors there are. A clamp follows every product, so that
// none is contracted with an addition.
template <bool SMOOTH, class T>
void quantize_row(int8_t* codes, const T* x, const float* inv_smooth, int64_t channels, float scale, float zero,
                  float low, float high) {
  for (int64_t d = 0; d < channels; d++) {
    float v = widened(x[d]);
    if (SMOOTH) v = v * inv_smooth[d];
    v = clamped(v * scale, -FAR, FAR);
    v = (v + MAGIC) - MAGIC;
    codes[d] = static_cast<int8_t>(static_cast<int32_t>(clamped(v + zero, low, high)));
  }
}

// The codes of smoothed values, as floats.
inline f32xw quantized(f32xw v, float inv_scale, float zero, float low, float high) {
  v = at_most(FAR, at_least(-FAR, v * inv_scale));
  v = (v + MAGIC) - MAGIC;
  return at_most(high, at_least(low, v + zero));
}

}  // namespace
}  // namespace ptq4vm
