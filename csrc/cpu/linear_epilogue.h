// The end of a linear: its sums get the zero point, rescale, bias, and the float32, bfloat16 or codes that are stored.
// Every output is rounded as the reference rounds it.
#pragma once

#include <algorithm>

#include "linear_tiles.h"
#include "math.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

constexpr int64_t PARTS = LANES / WIDTH;  // registers of 16 sums

inline i32xw splat(int32_t value) { return i32xw{} + value; }

// Returns sum + the two products of 16-bit numbers in each lane.
#if defined(__AVX512VNNI__)
inline i32xw add_products(i32xw sum, i32xw a, i32xw b) {
  return (i32xw)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
inline i32xw add_products(i32xw sum, i32xw a, i32xw b) {
  return sum + (i32xw)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#elif defined(__SSE2__)
inline i32xw add_products(i32xw sum, i32xw a, i32xw b) { return sum + (i32xw)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
inline i32xw add_products(i32xw sum, i32xw a, i32xw b) {
  return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
#endif

inline int32_t pair(int first, int second) {
  const int16_t both[] = {static_cast<int16_t>(first), static_cast<int16_t>(second)};
  return load_as<int32_t>(both);
}

// Two pairs whose products are -zero_point · sum: one instruction, where a multiplication and a subtraction are three.
inline int32_t zero_point_pair(int32_t zero_point) { return pair(zero_point, zero_point * 256); }

inline int32_t sum_pair(int32_t sum) {
  const int low = static_cast<int8_t>(sum & 255);
  return pair(-low, -((sum - low) >> 8));
}

// The qparams of a row of x, and those of the codes that its results become.
struct LinearRowQParams {
  int32_t zero_point;  // a pair
  float scale, inv_scale;
  int32_t new_zero_point;
};

// The parameters of a block of output channels, zeros where there are no channels.
struct FeatureParameters {
  int64_t count;
  alignas(64) int32_t start[FEATURES_IN_BLOCK], sum[FEATURES_IN_BLOCK];  // of dot products; pairs
  alignas(64) float scale[FEATURES_IN_BLOCK], bias[FEATURES_IN_BLOCK], inv_smooth[FEATURES_IN_BLOCK];

  void read(const PackedWeight& w, const float* smooth, int64_t begin, int64_t end) {
    count = std::min(end, w.features) - begin;
    const int64_t size = end - begin;
    const auto copy = [&](auto* to, const auto* from) {
      std::fill(std::copy(from + begin, from + begin + count, to), to + size, 0);
    };
    copy(sum, w.sum);
    for (int64_t i = 0; i < size; i++) {
      start[i] = -OFFSET * sum[i];
      sum[i] = sum_pair(sum[i]);
    }
    copy(scale, w.scale);
    // what is not there changes nothing, not even the sign of a zero
    w.bias ? copy(bias, w.bias) : std::fill(bias, bias + size, -0.0f);
    smooth ? copy(inv_smooth, smooth) : std::fill(inv_smooth, inv_smooth + size, 1.0f);
  }
};

// Stores the first lanes of a vector; none if their number is negative.
#ifdef __AVX512F__
inline uint32_t first_lanes(int64_t count, int64_t all) {
  return count <= 0 ? 0 : ~uint32_t{0} >> (32 - std::min(count, all));
}

inline void store(float* to, f32xw value, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count, WIDTH), value);
}

inline void store(uint16_t* to, u16xw value, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count, WIDTH), (__m256i)value);
}

inline void store(int8_t* to, i8xw value, int64_t count) {
  _mm_mask_storeu_epi8(to, first_lanes(count, WIDTH), (__m128i)value);
}
#else
template <class T, class V>
inline void store(T* to, V value, int64_t count) {
  if (count >= WIDTH) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    T lanes[WIDTH];
    std::memcpy(lanes, &value, sizeof(value));
    for (int64_t i = 0; i < count; i++) to[i] = lanes[i];
  }
}
#endif

// A place for results: put() takes N vectors of a row, of which `count` lanes are there.
template <class T>
struct Output {
  T* y;
  int64_t stride;

  T* at(int64_t row, int64_t channel) const { return y + row * stride + channel; }
};

// Returns the output from some row and channel on.
template <class Out>
Out moved(Out out, int64_t row, int64_t channel) {
  out.y = out.at(row, channel);
  return out;
}

struct FloatOutput : Output<float> {
  template <int N>
  void put(float* to, int64_t count, const LinearRowQParams&, const float*, const f32xw (&values)[N]) const {
    for (int i = 0; i < N; i++) store(to + i * WIDTH, values[i], count - i * WIDTH);
  }
};

struct BFloat16Output : Output<uint16_t> {
  template <int N>
  void put(uint16_t* to, int64_t count, const LinearRowQParams&, const float*, const f32xw (&values)[N]) const {
    for (int i = 0; i < N; i++) {
      const auto bits = (u32xw)values[i];
      const u32xw rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
      const auto half = __builtin_convertvector(values[i] == values[i] ? rounded : quiet, u16xw);
      store(to + i * WIDTH, half, count - i * WIDTH);
    }
  }
};

#ifdef __AVX512VNNI__
// The same with an instruction that all processors with AMX have, and that takes denormal numbers for zeros.
struct NormalBFloat16Output : Output<uint16_t> {
  template <int N>
  void put(uint16_t* to, int64_t count, const LinearRowQParams&, const float*, const f32xw (&values)[N]) const {
    for (int i = 0; i < N; i += 2) {
      __m512i halves;
      __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(values[i + 1]), "v"(values[i]));
      _mm512_mask_storeu_epi16(to + i * WIDTH, first_lanes(count - i * WIDTH, 2 * WIDTH), halves);
    }
  }
};
#endif

// ops.quantize of the GELU. Clamping before the sum with the zero point makes the same codes.
struct CodesOutput : Output<int8_t> {
  float low, high;

  template <int N>
  void put(int8_t* to, int64_t count, const LinearRowQParams& row, const float* inv_smooth,
           const f32xw (&values)[N]) const {
    const auto zero_point = static_cast<float>(row.new_zero_point);
    for (int i = 0; i < N; i++) {
      const f32xw v = gelu(values[i]) * load_as<f32xw>(inv_smooth + i * WIDTH) * fill(row.inv_scale);
      const f32xw shifted = at_most(high - zero_point, at_least(low - zero_point, v)) + MAGIC;
      const i32xw codes = (i32xw)shifted + splat(row.new_zero_point);
      store(to + i * WIDTH, __builtin_convertvector(codes, i8xw), count - i * WIDTH);
    }
  }
};

// Sums of rows by GROUPS groups of 16 channels, from channel c of a block on: zero point, rescale, bias.
template <int GROUPS, class Out>
class Epilogue {
 public:
  // out: of the block's first channel
  Epilogue(const Out& out, const LinearRowQParams* rows, const FeatureParameters& f, int64_t c, const int32_t* acc)
      : out_(out), rows_(rows), acc_(acc), inv_smooth_(f.inv_smooth + c), c_(c), count_(f.count - c) {
    for (int i = 0; i < N; i++) {
      sum_[i] = load_as<i32xw>(f.sum + c + i * WIDTH);
      scale_[i] = load_as<f32xw>(f.scale + c + i * WIDTH);
      bias_[i] = load_as<f32xw>(f.bias + c + i * WIDTH);
    }
  }

  void operator()(int64_t begin, int64_t end) const {
    const int32_t* acc = acc_ + begin * N * WIDTH;
    auto* to = out_.at(begin, c_);
    for (const LinearRowQParams *row = rows_ + begin, *last = rows_ + end; row < last;
         row++, acc += N * WIDTH, to += out_.stride) {
      f32xw values[N];
      for (int i = 0; i < N; i++) {
        const i32xw exact = add_products(load_as<i32xw>(acc + i * WIDTH), sum_[i], splat(row->zero_point));
        values[i] = (__builtin_convertvector(exact, f32xw) * fill(row->scale)) * scale_[i] + bias_[i];
      }
      out_.put(to, count_, *row, inv_smooth_, values);
    }
  }

 private:
  static constexpr int N = GROUPS * PARTS;
  const Out out_;
  const LinearRowQParams* const rows_;
  const int32_t* const acc_;
  const float* const inv_smooth_;
  const int64_t c_, count_;
  i32xw sum_[N];
  f32xw scale_[N], bias_[N];
};

}  // namespace
}  // namespace ptq4vm::PTQ4VM_SET
