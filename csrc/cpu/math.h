// Functions of vectors. Relative errors are within 3e-7, unless one says more; what would be less than 2^-125.5 is
// zero; NaN stays NaN.
#pragma once

#include "vec.h"

namespace ptq4vm {
namespace {

inline f32xw minus_abs(f32xw x) { return (f32xw)((u32xw)x | 0x80000000u); }
inline f32xw abs(f32xw x) { return (f32xw)((u32xw)x & 0x7fffffffu); }

// Returns whether |x| is at most this in all lanes; NaN is not.
inline bool all_within(float bound, f32xw x) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(abs(x), fill(bound), _CMP_NLE_UQ) == 0;
#else
  bool within = true;
  for (int64_t i = 0; i < WIDTH; i++) within &= abs(x)[i] <= bound;
  return within;
#endif
}

// unit · 2^f for |f| <= 1/2, within 1e-7, and exact at 0 so that slow decays have no bias.
inline f32xw exp2_near_zero(f32xw f, float unit) {
  f32xw p = f * (unit * 1.326472717e-3f) + unit * 9.671512625e-3f;
  p = p * f + unit * 5.550733743e-2f;
  p = p * f + unit * 2.402224209e-1f;
  p = p * f + unit * 6.931469776e-1f;
  return p * f + unit;
}

constexpr float MAGIC =
    12582912.0f;  // 1.5 * 2^23: a small number added to it is rounded to an integer, in its low bits

inline f32xw round_small(f32xw x) { return (x + MAGIC) - MAGIC; }

// x plus this has the integer nearest to x, and 126, in its low bits: shifted up they are the float 2^(n - 1), and zero
// for n = -126. One more than that comes from the polynomial, so that no denormal arises: they take a hundred cycles.
constexpr float TO_EXPONENT = MAGIC + 126.0f;

inline f32xw half_power(f32xw shifted) { return (f32xw)((u32xw)shifted << 23); }

// (2^x - 1) / x for -1/2 <= x <= 0 and for -2 <= x <= 0, within 1e-6.
inline f32xw exp2_slope_to_half(f32xw x) {
  f32xw p = x * 8.384758323e-3f + 5.512808407e-2f;
  p = p * x + 2.401892734e-1f;
  return p * x + 6.931465999e-1f;
}

inline f32xw exp2_slope_to_two(f32xw x) {
  f32xw p = x * 8.643896294e-5f + 1.196837496e-3f;
  p = p * x + 9.483656765e-3f;
  p = p * x + 5.544275431e-2f;
  p = p * x + 2.402161257e-1f;
  return p * x + 6.931468929e-1f;
}

#ifdef __AVX512DQ__
// -126 <= x <= 128
inline f32xw exp2_within_range(f32xw x) {
  const f32xw f = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_maskz_scalef_ps(0xffff, exp2_near_zero(f, 1.0f), x - f);
}

// Zero where x < lowest, which is at least -125.5.
inline f32xw exp2(f32xw x, float lowest = -125.5f) {
  const f32xw f = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, fill(lowest), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, exp2_near_zero(f, 1.0f), x - f);
}
#else
inline f32xw exp2_within_range(f32xw x) {
  const f32xw shifted = x + TO_EXPONENT;
  return exp2_near_zero(x - (shifted - TO_EXPONENT), 2.0f) * half_power(shifted);
}

inline f32xw exp2(f32xw x, float lowest = -125.5f) {
  const f32xw power = exp2_within_range(at_most(128.0f, at_least(-126.0f, x)));
  return lowest <= -125.5f ? power : (f32xw)((u32xw)power & ~(u32xw)(x < lowest));
}
#endif

constexpr float LOG2_E = 1.442695041f, LN_2 = 0.6931471806f;

// For -87.3 <= x <= 89.
inline f32xw exp_bounded(f32xw x) {
  const f32xw shifted = x * 1.442695041f + TO_EXPONENT, n = shifted - TO_EXPONENT;
  // ln 2 in two parts, the first so short that n times it is exact.
  const f32xw r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f32xw p = r * 8.290314698e-3f + 4.189792923e-2f;
  p = p * r + 1.666763619e-1f;
  p = p * r + 4.999914954e-1f;
  p = p * r + 9.999997072e-1f;
  return (p * (r + r) + 2.0f) * half_power(shifted);
}

inline f32xw exp(f32xw x) { return exp_bounded(at_most(89.0f, at_least(-87.3f, x))); }

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
inline f32xw softplus(f32xw x) {
  const f32xw fraction = exp2_within_range(at_least(-87.0f, minus_abs(x)) * LOG2_E);
  return at_least(0.0f, x) + log1p_of_fraction(fraction);
}

// 1 + exp(-x), within 2e-7 for x >= -1 and (1 - x) · 1e-7 below, where silu is small.
inline f32xw one_plus_exp_minus(f32xw x) {
#ifdef __AVX512DQ__
  // Bounded only against denormals. A division by it costs nothing next to all this: Newton's step is slower.
  const f32xw t = at_least(-125.0f, x * -1.442695041f);
  const f32xw f = _mm512_maskz_reduce_ps(0xffff, t, _MM_FROUND_TO_NEAREST_INT);
  return 1.0f + (f32xw)_mm512_maskz_scalef_ps(0xffff, exp2_near_zero(f, 1.0f), t - f);
#else
  return 1.0f + exp(-x);
#endif
}

inline f32xw sigmoid(f32xw x) { return 1.0f / one_plus_exp_minus(x); }

inline f32xw silu(f32xw x) { return x / one_plus_exp_minus(x); }

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
      2.693186998e-01f,  -1.342536360e-01f, 9.929157048e-02f,  -7.952682674e-02f, 6.406287849e-02f,
      -5.008386448e-02f, 3.707728907e-02f,  -2.555050701e-02f, 1.683576778e-02f,  -1.089702640e-02f,
      5.784682464e-03f,  -2.079080557e-03f, 1.329495455e-03f,  -1.313163899e-03f, 4.798908776e-04f,
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
