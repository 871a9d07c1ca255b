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

inline void store(float* to, f32x16 value) { std::memcpy(to, &value, sizeof(value)); }

inline void store(bfloat16* to, f32x16 value) {
  const u32x16 bits = (u32x16)value;
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32x16 quiet = (bits >> 16) | 0x40;  // a NaN stays one
  const u16x16 half = __builtin_convertvector(value == value ? rounded : quiet, u16x16);
  std::memcpy(to, &half, sizeof(half));
}

template <class T>
inline void store_part(T* to, f32x16 value, int64_t count) {
  T buffer[LANES];
  store(buffer, value);
  std::memcpy(to, buffer, count * sizeof(T));
}

template <class T>
inline void store_some(T* to, f32x16 value, int64_t count) {
  count >= LANES ? store(to, value) : store_part(to, value, count);
}

inline f32x16 splat(float value) { return f32x16{} + value; }

}  // namespace
}  // namespace ptq4vm
