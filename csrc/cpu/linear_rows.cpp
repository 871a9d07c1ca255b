#include "linear.h"

#include <algorithm>

#include "vec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

constexpr int64_t STEP = 64, TILE = LANES * STEP;

typedef int16_t i16x32 __attribute__((vector_size(64)));

// A tile's codes as int8.
const int8_t* tile(const PackedWeight& w, int64_t index, int8_t* unpacked) {
  if (!w.nibbles) return static_cast<const int8_t*>(w.tiles) + index * TILE;
  const auto* from = static_cast<const uint8_t*>(w.tiles) + index * (TILE / 2);
  for (int64_t row = 0; row < LANES; row++) {
    for (int64_t i = 0; i < STEP / 2; i++) {
      const int byte = from[row * (STEP / 2) + i];
      unpacked[row * STEP + i] = static_cast<int8_t>(((byte & 15) ^ 8) - 8);
      unpacked[row * STEP + STEP / 2 + i] = static_cast<int8_t>(((byte >> 4) ^ 8) - 8);
    }
  }
  return unpacked;
}

inline void finish(const LinearRows& q, int64_t group, int64_t first, const i32x16* acc) {
  int32_t sums[LANES] = {};
  float scales[LANES] = {}, bias[LANES] = {};
  const int64_t n = group * LANES, count = std::min(LANES, q.weight.features - n);
  std::memcpy(sums, q.weight.sum + n, count * sizeof(float));
  std::memcpy(scales, q.weight.scale + n, count * sizeof(float));
  if (q.weight.bias) std::memcpy(bias, q.weight.bias + n, count * sizeof(float));
  for (int64_t r = 0; r < q.rows; r++) {
    const i32x16 exact = acc[r] - load_as<i32x16>(sums) * q.zero_point[r];
    f32x16 value = (__builtin_convertvector(exact, f32x16) * splat(q.x_scale[r])) * load(scales);
    if (q.weight.bias) value = value + load(bias);
    store(q.y + r * q.y_stride + n - first * LANES, value);
  }
}

}  // namespace

void linear_rows(const LinearRows& q, int64_t begin, int64_t end) {
  const int64_t steps = (q.weight.channels + STEP - 1) / STEP;
  alignas(64) int8_t unpacked[TILE];
  for (int64_t group = begin; group < end; group++) {
    i32x16 acc[FEW_ROWS] = {};
    for (int64_t step = 0; step < steps; step++) {
      const int8_t* codes = tile(q.weight, group * steps + step, unpacked);
      for (int64_t i = 0; i < LANES; i++) {
        const auto w = load_as<i16x32>(codes + i * STEP);
        const i16x32 even = (w << 8) >> 8, odd = w >> 8;
        for (int64_t r = 0; r < q.rows; r++) {
          const int8_t* x = q.x + r * q.x_stride + step * STEP + i * 4;
#if defined(__AVX512VNNI__)
          acc[r] = (i32x16)_mm512_dpwssd_epi32((__m512i)acc[r], (__m512i)even, _mm512_set1_epi32((x[0] & 0xffff) | x[2] * 65536));
          acc[r] = (i32x16)_mm512_dpwssd_epi32((__m512i)acc[r], (__m512i)odd, _mm512_set1_epi32((x[1] & 0xffff) | x[3] * 65536));
#else
          const auto e = (i32x16)even, o = (i32x16)odd;
          acc[r] += ((e << 16) >> 16) * x[0] + (e >> 16) * x[2] + ((o << 16) >> 16) * x[1] + (o >> 16) * x[3];
#endif
        }
      }
    }
    finish(q, group, begin, acc);
  }
}

#ifdef __AVX512VNNI__

#define PTQ4VM_TILES __attribute__((target("amx-tile,amx-int8")))

PTQ4VM_TILES void begin_tiles() {
  // All eight tiles are 16 rows of 64 bytes.
  static const struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

PTQ4VM_TILES void end_tiles() { _tile_release(); }

PTQ4VM_TILES void linear_rows_amx(const LinearRows& q, int64_t begin, int64_t end) {
  const int64_t steps = (q.weight.channels + STEP - 1) / STEP;
  alignas(64) int8_t unpacked[TILE];
  alignas(64) i32x16 acc[FEW_ROWS];
  for (int64_t group = begin; group < end; group++) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < steps; step++) {
      const int8_t* codes = tile(q.weight, group * steps + step, unpacked);
      __asm__ volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
      _tile_loadd(6, codes, STEP);
      _tile_loadd(4, q.x + step * STEP, q.x_stride);
      _tile_dpbssd(0, 4, 6);
      if (q.rows > LANES) {
        _tile_loadd(5, q.x + LANES * q.x_stride + step * STEP, q.x_stride);
        _tile_dpbssd(1, 5, 6);
      }
    }
    _tile_stored(0, acc, STEP);
    _tile_stored(1, acc + LANES, STEP);
    finish(q, group, begin, acc);
  }
}

#endif

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
