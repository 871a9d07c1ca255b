// ops.quantize, ops.choose_qparams and ops.dequantize, bit for bit. Compiled without contraction:
// every product is rounded before the next operation.
#include "quantize.h"

#include <cfloat>
#include <cmath>

namespace ptq4vm::PTQ4VM_SET {
namespace {

template <bool SMOOTH, class T>
void codes_of_row(int8_t* codes, const T* x, const float* inv_smooth, int64_t channels, RowQParams qparams) {
  for (int64_t d = 0; d < channels; d += WIDTH) {
    f32xw value = load_lanes(x + d, channels - d);
    if (SMOOTH) value *= load_lanes(inv_smooth + d, channels - d);
    store_codes(codes + d, value, qparams, channels - d);
  }
}

template <class T>
void quantize_rows(const Quantize& q, const T* x, int64_t begin, int64_t end) {
  const auto one = q.qparams.inv_smooth ? codes_of_row<true, T> : codes_of_row<false, T>;
  for (int64_t r = begin; r < end; r++) {
    one(q.codes + r * q.channels, x + r * q.channels, q.qparams.inv_smooth, q.channels, RowQParams(q.qparams, r));
  }
}

struct Range {
  float low, high;
};

// The smallest and the largest of a row and zero, NaN if any is.
template <class T>
Range range_of_row(const T* x, const float* inv_smooth, int64_t channels) {
  f32xw low{}, high{};
  i32xw ordered = ~i32xw{};
  for (int64_t d = 0; d < channels; d += WIDTH) {
    f32xw value = load_lanes(x + d, channels - d);
    if (inv_smooth) value *= load_lanes(inv_smooth + d, channels - d);
    low = value < low ? value : low;
    high = value > high ? value : high;
    ordered &= value == value;
  }
  Range range{0.0f, 0.0f};
  for (int64_t i = 0; i < WIDTH; i++) {
    if (!ordered[i]) return {NAN, NAN};
    range.low = low[i] < range.low ? low[i] : range.low;
    range.high = high[i] > range.high ? high[i] : range.high;
  }
  return range;
}

template <class T>
void choose_rows(const ChooseQParams& q, const T* x, int64_t begin, int64_t end) {
  const float intervals = static_cast<float>(q.high - q.low), least = static_cast<float>(q.low);
  for (int64_t r = begin; r < end; r++) {
    const Range range = range_of_row(x + r * q.channels, q.inv_smooth, q.channels);
    const float wide = (range.high - range.low) / intervals, scale = wide < FLT_MIN ? FLT_MIN : wide;
    const float zero = least - std::nearbyint(range.low / scale);
    q.scale[r] = scale;
    // Zero lies in the range, so that its code needs no bounds; a row with NaN has no range.
    q.zero_point[r] = zero == zero ? static_cast<int32_t>(zero) : 0;
  }
}

}  // namespace

void run(const Quantize& q, int64_t begin, int64_t end) {
  with_type(q.x_type, [&](auto t) { quantize_rows(q, static_cast<const decltype(t)*>(q.x), begin, end); });
}

void run(const ChooseQParams& q, int64_t begin, int64_t end) {
  with_type(q.x_type, [&](auto t) { choose_rows(q, static_cast<const decltype(t)*>(q.x), begin, end); });
}

void run(const Dequantize& q, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const float scale = q.scale[r % q.scales], zero = static_cast<float>(q.zero_point[r % q.scales]);
    const int8_t* x = q.x + r * q.channels;
    float* y = q.y + r * q.channels;
    for (int64_t d = 0; d < q.channels; d++) y[d] = (static_cast<float>(x[d]) - zero) * scale;
  }
}

}  // namespace ptq4vm::PTQ4VM_SET
