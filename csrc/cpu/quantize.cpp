// reference.quantize, bit for bit: smooth, multiply by the reciprocal, round half to even, shift, clamp.
// Compiled without contraction: every product is rounded before the next operation.
#include "kernels.h"
#include "vec.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

template <class T>
void rows(const Quantize& q, const T* x, int64_t begin, int64_t end) {
  const f32x16 low = splat(q.low), high = splat(q.high);
  // Beyond this every value is clamped whatever the zero point, and below it rounding by addition is exact.
  const f32x16 far = splat(1024.0f);
  for (int64_t r = begin; r < end; r++) {
    const f32x16 scale = splat(q.inv_scale[r % q.scales]), zero = splat(q.zero_point[r % q.scales]);
    const T* from = x + r * q.channels;
    int8_t* to = q.codes + r * q.channels;
    for (int64_t d = 0; d < q.channels; d += LANES) {
      const int64_t count = q.channels - d;
      f32x16 v = load_some(from + d, count);
      if (q.inv_smooth) v = v * load_some(q.inv_smooth + d, count);
      v = max(min(v * scale, far), -far);
      v = max(min(round_even(v) + zero, high), low);
      const i8x16 codes = __builtin_convertvector(__builtin_convertvector(v, i32x16), i8x16);
      std::memcpy(to + d, &codes, count < LANES ? count : LANES);
    }
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
