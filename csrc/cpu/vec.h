// Vectors as wide as a register, their loads and stores, in what the compiler maps to every instruction set; intrinsics
// only where its code is slow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../operators.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace ptq4vm {
namespace {

// GCC splits wider vectors into registers too, but compares, selects and converts them lane by lane.
#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif

typedef float f32xw __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t i32xw __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t u32xw __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint16_t u16xw __attribute__((vector_size(WIDTH * sizeof(uint16_t))));
typedef int8_t i8xw __attribute__((vector_size(WIDTH)));

constexpr int64_t vectors_of(int64_t channels) { return divided_up(channels, WIDTH); }

// Upper half of a float32; converts by rounding to nearest even.
struct bfloat16 {
  uint16_t bits;
};

// Calls f with a number of the type.
template <class F>
inline void with_type(Float type, F f) {
  type == Float::f32 ? f(float{}) : f(bfloat16{});
}

template <class V, class T>
inline V load_as(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

// A difference, for the sum of 0 and -0 is not -0, so that compilers keep it.
inline f32xw fill(float value) { return value - f32xw{}; }

inline f32xw load_all(const float* from) { return load_as<f32xw>(from); }

inline f32xw load_all(const bfloat16* from) {
#if defined(__AVX512F__)  // one instruction; GCC takes five
  const u32xw bits = (u32xw)_mm512_maskz_cvtepu16_epi32(0xffff, load_as<__m256i>(from));
#elif defined(__AVX2__)
  const u32xw bits = (u32xw)_mm256_cvtepu16_epi32(load_as<__m128i>(from));
#else
  const u32xw bits = __builtin_convertvector(load_as<u16xw>(from), u32xw);
#endif
  return (f32xw)(bits << 16);
}

inline void store_all(float* to, f32xw value) { std::memcpy(to, &value, sizeof(value)); }

inline void store_all(bfloat16* to, f32xw value) {
  const u32xw bits = (u32xw)value;
  const u32xw rounded = bits + 0x7fff + ((bits >> 16) & 1);
#ifdef __AVX512BW__
  // A NaN is not rounded. One that comes of arithmetic has its highest fraction bit, so that it stays one.
  const __mmask16 ordered = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  const __m512i halves = _mm512_mask_mov_epi32((__m512i)bits, ordered, (__m512i)rounded);
  alignas(64) static constexpr uint16_t UPPER[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i packed = _mm512_maskz_permutexvar_epi16(0xffff, load_as<__m512i>(UPPER), halves);
  std::memcpy(to, &packed, WIDTH * sizeof(bfloat16));
#else
  const u32xw quiet = bits | 0x400000;  // a NaN stays one
  const u16xw half = __builtin_convertvector((value == value ? rounded : quiet) >> 16, u16xw);
  std::memcpy(to, &half, sizeof(half));
#endif
}

// The first `count` lanes, at least one; the others are zero.
template <class T>
inline f32xw load_lanes(const T* from, int64_t count) {
  if (count >= WIDTH) return load_all(from);
  T lanes[WIDTH] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load_all(lanes);
}

template <class T>
inline void store_lanes(T* to, f32xw value, int64_t count) {
  if (count >= WIDTH) {
    store_all(to, value);
  } else {
    T lanes[WIDTH];
    store_all(lanes, value);
    std::memcpy(to, lanes, count * sizeof(T));
  }
}

// (channels, size) ↔ a vector of channels for each of `size`. Lanes without a channel are zeros.
inline void load_columns(const float* from, int64_t size, int64_t channels, f32xw* to) {
  for (int64_t k = 0; k < size; k++) {
    float lanes[WIDTH] = {};
    for (int64_t i = 0; i < std::min(WIDTH, channels); i++) lanes[i] = from[i * size + k];
    to[k] = load_all(lanes);
  }
}

inline void store_columns(float* to, int64_t size, int64_t channels, const f32xw* from) {
  for (int64_t k = 0; k < size; k++) {
    for (int64_t i = 0; i < std::min(WIDTH, channels); i++) to[i * size + k] = from[k][i];
  }
}

// The 4-bit codes of 32 bytes: those of the low nibbles, then those of the high ones.
inline void unpack_nibbles(int8_t* to, const uint8_t* from) {
  typedef uint8_t u8x32 __attribute__((vector_size(32)));
  const auto bytes = load_as<u8x32>(from);
  const u8x32 codes[] = {((bytes & 15) ^ 8) - 8, ((bytes >> 4) ^ 8) - 8};
  std::memcpy(to, codes, sizeof(codes));
}

// Calls work(n) for constants n below N. GCC unrolls a loop too late to keep an array in registers.
template <class Work, int... n>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, n...>, Work work) {
  (work(std::integral_constant<int, n>()), ...);
}

template <int N, class Work>
inline __attribute__((always_inline)) void unroll(Work work) {
  unrolled(std::make_integer_sequence<int, N>(), work);
}

// NaN where x is. GCC compares and selects where x86 has one instruction: a fifth of a whole scan.
#if defined(__AVX512F__)
// Its header warns of the intrinsics without a mask.
inline f32xw larger(f32xw y, f32xw x) { return _mm512_maskz_max_ps(0xffff, y, x); }
inline f32xw smaller(f32xw y, f32xw x) { return _mm512_maskz_min_ps(0xffff, y, x); }
#elif defined(__AVX__)
inline f32xw larger(f32xw y, f32xw x) { return _mm256_max_ps(y, x); }
inline f32xw smaller(f32xw y, f32xw x) { return _mm256_min_ps(y, x); }
#elif defined(__SSE2__)
inline f32xw larger(f32xw y, f32xw x) { return _mm_max_ps(y, x); }
inline f32xw smaller(f32xw y, f32xw x) { return _mm_min_ps(y, x); }
#else
inline f32xw larger(f32xw y, f32xw x) { return y > x ? y : x; }
inline f32xw smaller(f32xw y, f32xw x) { return y < x ? y : x; }
#endif

inline f32xw at_least(float bound, f32xw x) { return larger(fill(bound), x); }
inline f32xw at_most(float bound, f32xw x) { return smaller(fill(bound), x); }

}  // namespace
}  // namespace ptq4vm
