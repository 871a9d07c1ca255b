// reference.quantize, bit for bit: smooth, multiply by the reciprocal, round half to even, shift, clamp.
// Compiled without contraction: every product is rounded before the next operation.
#include "kernels.h"
#include "vec.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

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

// One row; a plain loop, which compilers turn into whatever vectors there are.
template <bool SMOOTH, class T>
void row(int8_t* codes, const T* x, const float* inv_smooth, int64_t channels, float scale, float zero, float low,
         float high) {
  // Beyond this every value is clamped whatever the zero point, and below it rounding by addition is exact.
  constexpr float FAR = 1024.0f, MAGIC = 12582912.0f;  // 1.5 * 2^23
  for (int64_t d = 0; d < channels; d++) {
    float v = widened(x[d]);
    if (SMOOTH) v = v * inv_smooth[d];
    v = clamped(v * scale, -FAR, FAR);
    v = (v + MAGIC) - MAGIC;
    codes[d] = static_cast<int8_t>(static_cast<int32_t>(clamped(v + zero, low, high)));
  }
}

template <class T>
void rows(const Quantize& q, const T* x, int64_t begin, int64_t end) {
  const auto one = q.inv_smooth ? row<true, T> : row<false, T>;
  for (int64_t r = begin; r < end; r++) {
    const int64_t i = r % q.scales, at = r * q.channels;
    one(q.codes + at, x + at, q.inv_smooth, q.channels, q.inv_scale[i], static_cast<float>(q.zero_point[i]),
        static_cast<float>(q.low), static_cast<float>(q.high));
  }
}

}  // namespace

void quantize(const Quantize& q, int64_t begin, int64_t end) {
  if (q.x_type == Float::f32) {
    rows(q, static_cast<const float*>(q.x), begin, end);
  } else {
    rows(q, static_cast<const bfloat16*>(q.x), begin, end);
  }
}

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
