// reference.quantize, reference.choose_qparams and reference.dequantize, bit for bit. Compiled without contraction:
// every product is rounded before the next operation.
#include "kernels.h"
#include "quantize.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

template <bool SMOOTH, class T>
void row(int8_t* codes, const T* x, const float* inv_smooth, int64_t channels, Grid grid) {
  for (int64_t d = 0; d < channels; d += WIDTH) {
    f32xw value = load_lanes(x + d, channels - d);
    if (SMOOTH) value *= load_lanes(inv_smooth + d, channels - d);
    store_codes(codes + d, value, grid, channels - d);
  }
}

template <class T>
void rows(const Quantize& q, const T* x, int64_t begin, int64_t end) {
  const auto one = q.inv_smooth ? row<true, T> : row<false, T>;
  for (int64_t r = begin; r < end; r++) {
    const int64_t i = r % q.scales, at = r * q.channels;
    one(q.codes + at, x + at, q.inv_smooth, q.channels, Grid(q.inv_scale[i], q.zero_point[i], q.low, q.high));
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
