// ops.fake_quantize, bit for bit, and its straight-through gradient in one pass over memory.
// Compiled without contraction: every product is rounded before the next operation.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "math.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

// One row: codes of v = x · smooth · factor, or of x · smooth / factor, are clamped to [low, high].
struct FakeQuantRow {
  float scale, factor, low, high;

  FakeQuantRow(const FakeQuantize& q, int64_t r) {
    const int64_t i = r % q.scales;
    const float zero = q.zero_point ? q.zero_point[i] : 0.0f;
    scale = q.scale[i];
    factor = q.zero_point ? 1.0f / scale : scale;
    low = static_cast<float>(q.low) - zero, high = static_cast<float>(q.high) - zero;
  }
};

// The first operand where the other's bits are set, else zero.
inline f32xw where(f32xw value, u32xw mask) { return (f32xw)((u32xw)value & mask); }

// x times the smoothing, where there is one.
template <bool SMOOTH>
inline f32xw smoothed(const FakeQuantize& q, f32xw x, int64_t d, int64_t left) {
  return SMOOTH ? x * load_lanes(q.smooth + d, left) : x;
}

// The code before it is clamped, and v, which is bounded where the code is out of range whatever the zero point.
template <bool DIVIDE>
inline f32xw code(f32xw x, float factor, f32xw& v) {
  constexpr float FAR = 1024.0f;
  v = at_most(FAR, at_least(-FAR, DIVIDE ? x / factor : x * factor));
  return round_small(v);
}

template <bool DIVIDE, bool SMOOTH>
void forward(const FakeQuantize& q, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const FakeQuantRow row(q, r);
    const int64_t at = r * q.channels;
    for (int64_t d = 0; d < q.channels; d += WIDTH) {
      const int64_t left = q.channels - d;
      f32xw v;
      const f32xw x = smoothed<SMOOTH>(q, load_lanes(q.x + at + d, left), d, left);
      store_lanes(q.y + at + d, at_most(row.high, at_least(row.low, code<DIVIDE>(x, row.factor, v))) * row.scale, left);
    }
  }
}

template <bool DIVIDE, bool SMOOTH>
void backward(const FakeQuantizeBackward& b, int64_t begin, int64_t end) {
  const FakeQuantize& q = b.forward;
  for (int64_t block = begin; block < end; block++) {
    float* sums = b.smooth ? b.smooth + block * q.channels : nullptr;
    if (sums) std::fill_n(sums, q.channels, 0.0f);
    for (int64_t r = block * ROWS_IN_SUM; r < std::min(q.rows, (block + 1) * ROWS_IN_SUM); r++) {
      const FakeQuantRow row(q, r);
      const int64_t at = r * q.channels;
      f32xw sum_scale{}, sum_clamped{};
      for (int64_t d = 0; d < q.channels; d += WIDTH) {
        const int64_t left = q.channels - d;
        const f32xw x = load_lanes(q.x + at + d, left), grad = load_lanes(b.grad + at + d, left);
        f32xw v;
        const f32xw free = code<DIVIDE>(smoothed<SMOOTH>(q, x, d, left), row.factor, v);
        const f32xw clamped = at_most(row.high, at_least(row.low, free));
        const u32xw inside = (u32xw)(free == clamped);
        const f32xw through = where(grad, inside);
        if (b.x) store_lanes(b.x + at + d, smoothed<SMOOTH>(q, through, d, left), left);
        if (sums) store_lanes(sums + d, load_lanes(sums + d, left) + through * x, left);
        sum_scale += grad * (clamped - where(v, inside));
        sum_clamped += where(grad, ~inside);
      }
      if (b.scale) b.scale[r] = sum(sum_scale);
      if (b.zero_point) b.zero_point[r] = -row.scale * sum(sum_clamped);
    }
  }
}

// Calls run(DIVIDE, SMOOTH) with constants.
template <class Run>
void choose(const FakeQuantize& q, Run run) {
  const auto with_smooth = [&](auto divide) {
    q.smooth ? run(divide, std::true_type()) : run(divide, std::false_type());
  };
  q.zero_point ? with_smooth(std::false_type()) : with_smooth(std::true_type());
}

}  // namespace

void run(const FakeQuantize& q, int64_t begin, int64_t end) {
  choose(q, [&](auto divide, auto smooth) { forward<divide(), smooth()>(q, begin, end); });
}

void run(const FakeQuantizeBackward& b, int64_t begin, int64_t end) {
  choose(b.forward, [&](auto divide, auto smooth) { backward<divide(), smooth()>(b, begin, end); });
}

}  // namespace ptq4vm::PTQ4VM_SET
