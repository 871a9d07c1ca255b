// ops.quantize of values in registers, bit for bit. A product is followed by another product, a bound or a
// conversion, never by a sum: so no compiler flag can contract it, and files that allow contraction may include this.
#pragma once

#include "kernels.h"
#include "math.h"

namespace ptq4vm {
namespace {

// The qparams of a row, a token.
struct RowQParams {
  float inv_scale, low, high;  // bounds of the code less the zero point: one conversion rounds, and cannot overflow
  int32_t zero_point;

  RowQParams(float inv, int32_t zero, int least, int most)
      : inv_scale(inv), low(static_cast<float>(least) - static_cast<float>(zero)),
        high(static_cast<float>(most) - static_cast<float>(zero)), zero_point(zero) {}

  // The qparams of a row of a set.
  RowQParams(const QParams& q, int64_t row, int64_t set = 0)
      : RowQParams(q.inv_scale[set * q.scales + row % q.scales], q.zero_point[set * q.scales + row % q.scales], q.low,
                   q.high) {}
};

// The codes of a vector, already smoothed (multiplied by inv_smooth). NaN has the code 0, as in torch.
inline void store_codes(int8_t* to, f32xw value, RowQParams qparams) {
  value = at_most(qparams.high, at_least(qparams.low, value * qparams.inv_scale));
#if defined(__AVX512F__)
  const __mmask16 ordered = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  const __m512i codes =
      _mm512_maskz_add_epi32(ordered, _mm512_maskz_cvtps_epi32(0xffff, value), _mm512_set1_epi32(qparams.zero_point));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, codes));
#elif defined(__AVX2__)
  const __m256i shifted = _mm256_add_epi32(_mm256_cvtps_epi32(value), _mm256_set1_epi32(qparams.zero_point));
  const __m256i codes = _mm256_and_si256(shifted, _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_ORD_Q)));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
#elif defined(__SSE2__)
  const __m128i codes = _mm_and_si128(_mm_add_epi32(_mm_cvtps_epi32(value), _mm_set1_epi32(qparams.zero_point)),
                                      _mm_castps_si128(_mm_cmpord_ps(value, value)));
  const __m128i words = _mm_packs_epi32(codes, codes);
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packs_epi16(words, words));
  std::memcpy(to, &bytes, sizeof(bytes));
#else
  for (int64_t i = 0; i < WIDTH; i++) {
    const float code = __builtin_rintf(value[i]);
    to[i] = static_cast<int8_t>(code == code ? static_cast<int32_t>(code) + qparams.zero_point : 0);
  }
#endif
}

// The codes less the zero point, as floats; NaN stays NaN.
inline f32xw rounded_differences(f32xw value, RowQParams qparams) {
  return round_small(at_most(qparams.high, at_least(qparams.low, value * qparams.inv_scale)));
}

// The codes as floats.
inline f32xw rounded_codes(f32xw value, RowQParams qparams) {
  return rounded_differences(value, qparams) + static_cast<float>(qparams.zero_point);
}

// Codes as floats. GCC would convert bytes one by one.
inline f32xw load_codes(const int8_t* from) {
#if defined(__AVX512F__)
  return __builtin_convertvector((i32xw)_mm512_maskz_cvtepi8_epi32(0xffff, load_as<__m128i>(from)), f32xw);
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#elif defined(__SSE2__)
  const __m128i bytes = _mm_cvtsi32_si128(load_as<int32_t>(from)), zero = _mm_setzero_si128();
  const __m128i upper = _mm_unpacklo_epi16(zero, _mm_unpacklo_epi8(zero, bytes));  // of each lane
  return _mm_cvtepi32_ps(_mm_srai_epi32(upper, 24));
#else
  f32xw codes;
  for (int64_t i = 0; i < WIDTH; i++) codes[i] = from[i];
  return codes;
#endif
}

// The first `count` of them, at least one.
inline void store_codes(int8_t* to, f32xw value, RowQParams qparams, int64_t count) {
  if (count >= WIDTH) {
    store_codes(to, value, qparams);
  } else {
    int8_t codes[WIDTH];
    store_codes(codes, value, qparams);
    std::memcpy(to, codes, count);
  }
}

}  // namespace
}  // namespace ptq4vm
