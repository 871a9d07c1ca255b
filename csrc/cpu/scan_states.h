// The recurrence of a scan, with a block of states in registers.
#pragma once

#include "quantize.h"
#include "scan_chunk.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

constexpr int BLOCK = 8;  // states

// Calls work(N, first) for blocks of N states; N is a constant, smaller for the last ones.
template <int N = BLOCK, class Work>
inline void for_states(int64_t states, Work work, int64_t first = 0) {
  for (; first + N <= states; first += N) work(std::integral_constant<int, N>(), first);
  if constexpr (N > 1) for_states<N / 2>(states, work, first);
}

// The exponents x of the decays 2^x of a chunk, a vector of channels and a block of states. The less they span, the
// fewer operations a decay takes; where it is 1 + x · slope(x), even a slow one is exact relative to |x|.
enum class Span {
  half,    // -1/2 <= x <= 0
  two,     // -2 <= x <= 0
  normal,  // -125 <= x <= 0
  any,     // and zero where floats do not hold the decay
};

constexpr float NORMAL = 125.0f;
constexpr float SMALLEST = 64.0f;  // decays of gradients: below 2^-SMALLEST products become denormal, which are slow

// Returns the span of exponents, of which `far` is at least as long as the longest, and not finite if any is positive.
inline Span span_of(f32xw far, float normal = NORMAL) {
  return !all_within(normal, far) ? Span::any
         : !all_within(2.0f, far) ? Span::normal
         : !all_within(0.5f, far) ? Span::two
                                  : Span::half;
}

template <Span SPAN>
inline f32xw decay(f32xw x, float lowest) {
  if constexpr (SPAN == Span::half) return x * exp2_slope_to_half(x) + 1.0f;
  if constexpr (SPAN == Span::two) return x * exp2_slope_to_two(x) + 1.0f;
  if constexpr (SPAN == Span::normal) return exp2_within_range(x);
  return exp2(x, lowest);
}

// Returns 2^x · h + input.
template <Span SPAN>
inline f32xw decayed(f32xw h, f32xw x, f32xw input) {
  if constexpr (SPAN == Span::half) return h * (x * exp2_slope_to_half(x)) + (input + h);
  if constexpr (SPAN == Span::two) return h * (x * exp2_slope_to_two(x)) + (input + h);
  return decay<SPAN>(x, -NORMAL) * h + input;
}

// Calls work(SPAN) with a constant that is the span.
template <class Work>
inline void for_span(Span span, Work work) {
  switch (span) {
    case Span::half: return work(std::integral_constant<Span, Span::half>());
    case Span::two: return work(std::integral_constant<Span, Span::two>());
    case Span::normal: return work(std::integral_constant<Span, Span::normal>());
    case Span::any: return work(std::integral_constant<Span, Span::any>());
  }
}

// States that a chunk finds and leaves in floating point.
struct FloatStates {
  f32xw* values;

  f32xw load(int64_t n) const { return values[n]; }
  void store(int64_t n, f32xw h) const { values[n] = h; }

  template <Span SPAN>
  f32xw next(f32xw h, f32xw x, f32xw input, int64_t) const {
    return decayed<SPAN>(h, x, input);
  }

  template <Span>
  f32xw kept(f32xw state, int64_t) const {
    return state;
  }
};

// The scales that make codes of the states of a chunk's tokens, and states of the codes of the tokens before them.
struct StateQuantization {
  void begin(const QuantizedScan& q, int64_t token, const ScanCoefficients& coefficients) {
    const int64_t tokens = std::min(CHUNK, q.scan.tokens - token);
    low = q.low, high = q.high;
    zero_if_finite = 0.0f;
    for (int64_t t = 0; t < tokens; t++) {
      inv_scale[t] = q.state_inv_scale[(token + t) % q.scales];
      // With zero the first token finds no state, whatever codes another image or panel has left.
      scale_before[t] = token + t > 0 ? q.state_scale[(token + t - 1) % q.scales] : 0.0f;
      zero_if_finite += 0.0f * inv_scale[t] + 0.0f * scale_before[t];
    }
    for (int64_t i = 0; i < tokens * q.scan.states; i++) zero_if_finite += 0.0f * coefficients.B[i];
  }

  // Not finite either if a state of the chunk may be NaN: Span::any makes those the code 0.
  f32xw longest(const ScanChunk& c, int64_t v, f32xw dt) const {
    for (int64_t t = 0; t < c.tokens; t++) dt += 0.0f * c.dt_u[v][t];
    return dt + zero_if_finite;
  }

  float inv_scale[CHUNK], scale_before[CHUNK], zero_if_finite;
  int low, high;
};

// States that are codes from one token to the next: int8 between chunks, floats within one.
struct QuantizedStates {
  int8_t* values;
  const StateQuantization& quantization;
  int low, high;

  QuantizedStates(int8_t* values, const StateQuantization& quantization)
      : values(values), quantization(quantization), low(quantization.low), high(quantization.high) {}

  RowQParams qparams(float inv_scale) const { return {inv_scale, 0, low, high}; }
  f32xw load(int64_t n) const { return load_codes(values + n * WIDTH); }
  void store(int64_t n, f32xw code) const { store_codes(values + n * WIDTH, code, qparams(1.0f)); }

  template <Span SPAN>
  f32xw next(f32xw code, f32xw x, f32xw input, int64_t t) const {
    return multiply_add(decay<SPAN>(x, -NORMAL) * quantization.scale_before[t], code, input);
  }

  template <Span SPAN>
  f32xw kept(f32xw state, int64_t t) const {
    const f32xw code = rounded_differences(state, qparams(quantization.inv_scale[t]));
    return SPAN == Span::any ? (code == code ? code : f32xw{}) : code;
  }
};

template <Span SPAN, int N, class Kept>
void recur_block(ScanChunk& c, int64_t v, const ScanCoefficients& coefficients, int64_t S, int64_t first,
                 const f32xw* rates, Kept states) {
  const float *B = coefficients.B.data() + first, *C = coefficients.C.data() + first;
  f32xw h[N], rate[N];
  unroll<N>([&](auto n) { h[n] = states.load(n), rate[n] = rates[n]; });
  for (int64_t t = 0; t < c.tokens; t++, B += S, C += S) {
    const f32xw dt = c.dt[v][t], dt_u = c.dt_u[v][t];
    f32xw y = c.y[v][t];
    unroll<N>([&](auto n) {
      const f32xw state = states.template next<SPAN>(h[n], dt * rate[n], dt_u * B[n], t);
      y += state * C[n];
      h[n] = states.template kept<SPAN>(state, t);
    });
    c.y[v][t] = y;
  }
  unroll<N>([&](auto n) { states.store(n, h[n]); });
}

// The states of a panel of channels, and the decays' rates.
struct PanelStates {
  PanelStates(int64_t vectors, int64_t states, bool quantized = false)
      : S(states), rates(vectors * S), fastest(vectors * S), values(quantized ? 0 : vectors * S),
        codes(quantized ? vectors * S * WIDTH : 0) {}

  void begin(const float* A, int64_t first, int64_t last, int64_t channels) {
    for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
      f32xw* own = rates.data() + v * S;
      load_columns(A + e * S, S, channels - e, own);
      for (int64_t n = 0; n < S; n++) own[n] *= LOG2_E;
      for_states(S, [&](auto n, int64_t first) {
        f32xw& most = fastest[v * S + first] = f32xw{};
        for (int64_t i = 0; i < n; i++) most = larger(most, infinite_if_negative(-own[first + i]));
      });
    }
    std::fill(values.begin(), values.end(), f32xw{});
  }

  // The v-th vector of the chunk, which is the at-th of the panel.
  void recur(ScanChunk& c, int64_t v, f32xw longest, const ScanCoefficients& coefficients, int64_t at) {
    recur(c, v, longest, coefficients, at, [&](int64_t i) { return FloatStates{&values[i]}; });
  }

  void recur(ScanChunk& c, int64_t v, f32xw longest, const ScanCoefficients& coefficients, int64_t at,
             const StateQuantization& quantization) {
    recur(c, v, quantization.longest(c, v, longest), coefficients, at,
          [&](int64_t i) { return QuantizedStates(&codes[i * WIDTH], quantization); });
  }

  int64_t S;
  std::vector<f32xw> rates;    // (vectors, states): A · log2(e)
  std::vector<f32xw> fastest;  // of a block of states, at its first; infinite if one grows
  std::vector<f32xw> values;   // (vectors, states), or none
  std::vector<int8_t> codes;   // (vectors, states, WIDTH), or none

 private:
  // kept(i) is a block's states, the first of which is the i-th.
  template <class Kept>
  void recur(ScanChunk& c, int64_t v, f32xw longest, const ScanCoefficients& coefficients, int64_t at, Kept kept) {
    for_states(S, [&](auto n, int64_t first) {
      const int64_t i = at * S + first;
      for_span(span_of(longest * fastest[i]),
               [&](auto span) { recur_block<span(), n()>(c, v, coefficients, S, first, &rates[i], kept(i)); });
    });
  }
};

}  // namespace
}  // namespace ptq4vm::PTQ4VM_SET
