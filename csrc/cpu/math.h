// Vectors as wide as a register, and the functions of them that the scan and the convolution need. Relative errors are
// within 3e-7; what would be less than 2^-125.5 is zero; NaN stays NaN.
#pragma once

#include "vec.h"

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
typedef uint32_t u32xw __attribute__((vector_size(WIDTH * sizeof(float))));

inline f32xw fill(float value) { return value - f32xw{}; }  // not the sum, which turns -0 to 0 in an instruction

// The first `count` lanes, at least one; the others are zero.
inline f32xw load_lanes(const float* from, int64_t count) {
  if (count >= WIDTH) return load_as<f32xw>(from);
  f32xw value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store_lanes(float* to, f32xw value, int64_t count) {
  if (count >= WIDTH) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    std::memcpy(to, &value, count * sizeof(float));
  }
}

// NaN where x is. GCC compares and selects where x86 has one instruction: a fifth of a whole scan.
#if defined(__AVX512F__)
// Its header warns of the intrinsics without a mask.
inline f32xw at_least(float bound, f32xw x) { return _mm512_maskz_max_ps(0xffff, fill(bound), x); }
inline f32xw at_most(float bound, f32xw x) { return _mm512_maskz_min_ps(0xffff, fill(bound), x); }
#elif defined(__AVX__)
inline f32xw at_least(float bound, f32xw x) { return _mm256_max_ps(fill(bound), x); }
inline f32xw at_most(float bound, f32xw x) { return _mm256_min_ps(fill(bound), x); }
#elif defined(__SSE2__)
inline f32xw at_least(float bound, f32xw x) { return _mm_max_ps(fill(bound), x); }
inline f32xw at_most(float bound, f32xw x) { return _mm_min_ps(fill(bound), x); }
#else
inline f32xw at_least(float bound, f32xw x) { return fill(bound) > x ? fill(bound) : x; }
inline f32xw at_most(float bound, f32xw x) { return fill(bound) < x ? fill(bound) : x; }
#endif

inline f32xw minus_abs(f32xw x) { return (f32xw)((u32xw)x | 0x80000000u); }

// unit · 2^f for |f| <= 1/2, within 1e-7, and exact at 0 so that slow decays have no bias.
inline f32xw exp2_near_zero(f32xw f, float unit) {
  f32xw p = f * (unit * 1.326472717e-3f) + unit * 9.671512625e-3f;
  p = p * f + unit * 5.550733743e-2f;
  p = p * f + unit * 2.402224209e-1f;
  p = p * f + unit * 6.931469776e-1f;
  return p * f + unit;
}

// x plus this has the integer nearest to x, and 126, in its low bits: shifted up they are the float 2^(n - 1), and zero
// for n = -126. One more than that comes from the polynomial, so that no denormal arises: they take a hundred cycles.
constexpr float TO_EXPONENT = 12582912.0f + 126.0f;

inline f32xw half_power(f32xw shifted) { return (f32xw)((u32xw)shifted << 23); }

// Zero where x < lowest, which is at least -125.5.
inline f32xw exp2(f32xw x, float lowest = -125.5f) {
#ifdef __AVX512DQ__
  // Faster by a seventh of a whole scan.
  const f32xw f = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, fill(lowest), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, exp2_near_zero(f, 1.0f), x - f);
#else
  const f32xw bounded = at_most(128.0f, at_least(-126.0f, x)), shifted = bounded + TO_EXPONENT;
  const f32xw power = exp2_near_zero(bounded - (shifted - TO_EXPONENT), 2.0f) * half_power(shifted);
  return lowest <= -125.5f ? power : (f32xw)((u32xw)power & ~(u32xw)(x < lowest));
#endif
}

inline f32xw exp(f32xw x) {
  x = at_most(89.0f, at_least(-87.3f, x));
  const f32xw shifted = x * 1.442695041f + TO_EXPONENT;
  const f32xw n = shifted - TO_EXPONENT;
  // ln 2 in two parts, the first so short that n times it is exact.
  const f32xw rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return exp2_near_zero(rest * 1.442695041f, 2.0f) * half_power(shifted);
}

// log(1 + x) for 0 <= x <= 1
inline f32xw log1p_of_fraction(f32xw x) {
  f32xw p = x * 5.23269411e-3f - 2.950523728e-2f;
  p = p * x + 7.822594782e-2f;
  p = p * x - 1.36632453e-1f;
  p = p * x + 1.910600644e-1f;
  p = p * x - 2.484298211e-1f;
  p = p * x + 3.331909679e-1f;
  p = p * x - 4.999949314e-1f;
  p = p * x + 9.999999699e-1f;
  return p * x;
}

// Above 20 the logarithm is below half a unit in the last place of x: linear, as in torch.
inline f32xw softplus(f32xw x) { return at_least(0.0f, x) + log1p_of_fraction(exp(minus_abs(x))); }

inline f32xw sigmoid(f32xw x) { return 1.0f / (1.0f + exp(-x)); }

inline f32xw silu(f32xw x) { return x / (1.0f + exp(-x)); }

struct Gate {
  f32xw value, slope;
};

// silu and its derivative, which is within 1e-7 of the true one next to its zero.
inline Gate silu_with_slope(f32xw x) {
  x = at_least(-80.0f, x);  // there both are zero for all purposes, and the exponential is finite
  const f32xw e = exp(-x), s = 1.0f / (1.0f + e);
  return {x * s, s * (x * (e * s) + 1.0f)};
}

// a · b + c, in one rounding where there is an instruction for it, also where the compiler may not contract.
#if defined(__AVX512F__)
inline f32xw multiply_add(f32xw a, f32xw b, f32xw c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
inline f32xw multiply_add(f32xw a, f32xw b, f32xw c) { return _mm256_fmadd_ps(a, b, c); }
#else
inline f32xw multiply_add(f32xw a, f32xw b, f32xw c) { return a * b + c; }
#endif

// x / 2 · (1 + erf(x / √2)), with erf within 3e-7: an odd polynomial, which is 1 beyond its last argument. Its terms
// are summed in pairs: one after the other, they would wait for each other most of the time.
inline f32xw gelu(f32xw x) {
  constexpr float LAST = 5.25f;
  constexpr float C[] = {
      2.693186998e-01f, -1.342536360e-01f, 9.929157048e-02f, -7.952682674e-02f, 6.406287849e-02f,
      -5.008386448e-02f, 3.707728907e-02f, -2.555050701e-02f, 1.683576778e-02f, -1.089702640e-02f,
      5.784682464e-03f, -2.079080557e-03f, 1.329495455e-03f, -1.313163899e-03f, 4.798908776e-04f,
  };
  const f32xw bounded = at_most(LAST, at_least(-LAST, x));
  const f32xw t = multiply_add(bounded * (2.0f / (LAST * LAST)), bounded, fill(-1.0f));
  f32xw terms[8], power = t;
  for (int i = 0; i < 8; i++) terms[i] = i < 7 ? multiply_add(t, fill(C[2 * i + 1]), fill(C[2 * i])) : fill(C[14]);
  for (int count = 4; count > 0; count /= 2) {
    power = power * power;
    for (int i = 0; i < count; i++) terms[i] = multiply_add(terms[2 * i + 1], power, terms[2 * i]);
  }
  const f32xw half = 0.5f * x;
  return multiply_add(half, bounded * terms[0], half);
}

inline float sum(const f32xw& x) {
  typedef float f32x4 __attribute__((vector_size(16)));
  const float* lanes = reinterpret_cast<const float*>(&x);
  f32x4 four = load_as<f32x4>(lanes);
  for (int64_t i = 4; i < WIDTH; i += 4) four += load_as<f32x4>(lanes + i);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

}  // namespace
}  // namespace ptq4vm
