// reference.quantize, bit for bit: smooth, multiply by the reciprocal, round half to even, shift, clamp.
// Compiled without contraction: every product is rounded before the next operation.
#include "codes.h"
#include "kernels.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

template <class T>
void rows(const Quantize& q, const T* x, int64_t begin, int64_t end) {
  const auto one = q.inv_smooth ? quantize_row<true, T> : quantize_row<false, T>;
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
