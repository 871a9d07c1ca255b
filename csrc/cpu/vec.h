// Vectors of 16 lanes that the compiler maps to whatever the instruction set has: one AVX-512 register, two AVX,
// four SSE or NEON. No intrinsics, so that every kernel is written once.
#pragma once

#include <cstdint>
#include <cstring>

namespace ptq4vm {
namespace {

constexpr int64_t LANES = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

// Upper half of a float32; converts by rounding to nearest even.
struct bfloat16 {
  uint16_t bits;
};

template <class V, class T>
inline V load_as(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

inline f32x16 load(const float* from) { return load_as<f32x16>(from); }

inline f32x16 load(const bfloat16* from) {
  const u32x16 wide = __builtin_convertvector(load_as<u16x16>(from), u32x16) << 16;
  return (f32x16)wide;
}

inline void store(float* to, f32x16 value) { std::memcpy(to, &value, sizeof(value)); }

inline void store(bfloat16* to, f32x16 value) {
  const u32x16 bits = (u32x16)value;
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32x16 quiet = (bits >> 16) | 0x40;  // a NaN stays one
  const u16x16 half = __builtin_convertvector(value == value ? rounded : quiet, u16x16);
  std::memcpy(to, &half, sizeof(half));
}

// The first `count` lanes; the others are zero.
template <class T>
inline f32x16 load_part(const T* from, int64_t count) {
  T buffer[LANES] = {};
  std::memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_part(T* to, f32x16 value, int64_t count) {
  T buffer[LANES];
  store(buffer, value);
  std::memcpy(to, buffer, count * sizeof(T));
}

template <class T>
inline f32x16 load_some(const T* from, int64_t count) {
  return count >= LANES ? load(from) : load_part(from, count);
}

template <class T>
inline void store_some(T* to, f32x16 value, int64_t count) {
  count >= LANES ? store(to, value) : store_part(to, value, count);
}

inline f32x16 splat(float value) { return f32x16{} + value; }

inline f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

// To the nearest integer, ties to even, exact for |x| < 2^22.
inline f32x16 round_even(f32x16 x) {
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23
  return (x + magic) - magic;
}

}  // namespace
}  // namespace ptq4vm
