// reference.selective_scan, its adjoint, selective_scan_quantized, and fused.directional_scan(_quantize), in float32:
// outputs and gradients differ from those in float64 by about 1e-6 of the largest. Sums over channels and tokens have
// one order, whatever the division of work. Channels lie in lanes, B and C of a token are broadcast. A chunk of tokens
// goes through three stages: what needs no state, the recurrence with a block of states in registers, and the gate.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "quantize.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

constexpr int64_t CHUNK = 16;  // tokens; their states and the sums over channels fit the first cache
constexpr int BLOCK = 8;       // states
constexpr int64_t TILE = 64;   // bytes in a row of a packed weight: 4 codes for each of 16 output channels

// Vectors of neighbouring channels, and tokens of one image: whole lines of memory are read and written.
constexpr int64_t STRIP = 4;

struct Chunk {
  int64_t tokens, vectors;
  f32xw step[STRIP][CHUNK], drive[STRIP][CHUNK], y[STRIP][CHUNK];  // Δ, Δ · u, and y before the gate
};

inline int64_t vectors_of(int64_t channels) { return (channels + WIDTH - 1) / WIDTH; }

// use(v, value) for the vectors of `count` channels that begin at an element; lanes beyond are zero.
template <class T, class Use>
inline void each_vector(const T* from, int64_t count, Use use) {
  int64_t v = 0;
  for (; (v + 1) * WIDTH <= count; v++) use(v, load_lanes(from + v * WIDTH, WIDTH));
  if (v * WIDTH < count) use(v, load_lanes(from + v * WIDTH, count - v * WIDTH));
}

template <class Use>
inline void each_vector(const Rows& x, int64_t image, int64_t token, int64_t channel, int64_t count, Use use) {
  const int64_t at = image * x.image + token * x.row + channel;
  if (x.type == Float::f32) {
    each_vector(static_cast<const float*>(x.data) + at, count, use);
  } else {
    each_vector(static_cast<const bfloat16*>(x.data) + at, count, use);
  }
}

template <class T, class Make>
inline void write_vectors(T* to, int64_t count, Make make) {
  int64_t v = 0;
  for (; (v + 1) * WIDTH <= count; v++) store_lanes(to + v * WIDTH, make(v), WIDTH);
  if (v * WIDTH < count) store_lanes(to + v * WIDTH, make(v), count - v * WIDTH);
}

// make(v) to the vectors of `count` channels that begin at an element.
template <class Make>
inline void write_vectors(void* to, Float type, int64_t at, int64_t count, Make make) {
  if (type == Float::f32) {
    write_vectors(static_cast<float*>(to) + at, count, make);
  } else {
    write_vectors(static_cast<bfloat16*>(to) + at, count, make);
  }
}

// Tokens and channels of one image.
struct Window {
  const Scan& scan;
  int64_t image, token, tokens;
  int64_t channel, count;

  Window(const Scan& s, int64_t image, int64_t token, int64_t first, int64_t last)
      : scan(s), image(image), token(token), tokens(std::min(CHUNK, s.tokens - token)), channel(first),
        count(last - first) {}

  int64_t at(int64_t t) const { return (image * scan.tokens + token + t) * scan.channels + channel; }
  f32xw load(const float* x, int64_t t) const { return load_lanes(x + at(t), count); }
  f32xw load(const Rows& x, int64_t t) const {
    f32xw result{};
    each_vector(x, image, token + t, channel, count, [&](int64_t, f32xw value) { result = value; });
    return result;
  }
  void store(float* x, int64_t t, f32xw value) const { store_lanes(x + at(t), value, count); }
  f32xw load_channels(const float* x) const { return x ? load_lanes(x + channel, count) : f32xw{}; }
};

struct ChunkGrad {
  f32xw step[CHUNK], drive[CHUNK], y[CHUNK];
};

// B and C of a chunk's tokens: (tokens, states).
struct Mixing {
  explicit Mixing(int64_t states) : B(CHUNK * states), C(CHUNK * states) {}
  void read(const Scan& s, int64_t image, int64_t token) {
    for (int64_t t = 0; t < std::min(CHUNK, s.tokens - token); t++) {
      const auto copy = [&](const Rows& x, float* to) {
        each_vector(x, image, token + t, 0, s.states,
                    [&](int64_t v, f32xw value) { store_lanes(to + v * WIDTH, value, s.states - v * WIDTH); });
      };
      copy(s.B, B.data() + t * s.states);
      copy(s.C, C.data() + t * s.states);
    }
  }

  // B and C after another; none are zeros.
  void set(int64_t t, int64_t states, const float* both) {
    if (both) {
      std::copy_n(both, states, B.data() + t * states);
      std::copy_n(both + states, states, C.data() + t * states);
    } else {
      std::fill_n(B.data() + t * states, states, 0.0f);
      std::fill_n(C.data() + t * states, states, 0.0f);
    }
  }

  std::vector<float> B, C;
};

// work(N, first) for blocks of N states; N is a constant, smaller for the last ones.
template <int N = BLOCK, class Work>
inline void for_states(int64_t states, Work work, int64_t first = 0) {
  for (; first + N <= states; first += N) work(std::integral_constant<int, N>(), first);
  if constexpr (N > 1) for_states<N / 2>(states, work, first);
}

// work(n) for constants n below N. GCC unrolls a loop too late to keep an array in registers.
template <class Work, int... n>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, n...>, Work work) {
  (work(std::integral_constant<int, n>()), ...);
}

template <int N, class Work>
inline __attribute__((always_inline)) void unroll(Work work) {
  unrolled(std::make_integer_sequence<int, N>(), work);
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

// What `far` gives is at least as long as the longest exponent, and not finite if any is positive.
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

// 2^x · h + input
template <Span SPAN>
inline f32xw decayed(f32xw h, f32xw x, f32xw input) {
  if constexpr (SPAN == Span::half) return h * (x * exp2_slope_to_half(x)) + (input + h);
  if constexpr (SPAN == Span::two) return h * (x * exp2_slope_to_two(x)) + (input + h);
  return decay<SPAN>(x, -NORMAL) * h + input;
}

// work(SPAN) for a constant that is the span.
template <class Work>
inline void for_span(Span span, Work work) {
  switch (span) {
    case Span::half: return work(std::integral_constant<Span, Span::half>());
    case Span::two: return work(std::integral_constant<Span, Span::two>());
    case Span::normal: return work(std::integral_constant<Span, Span::normal>());
    case Span::any: return work(std::integral_constant<Span, Span::any>());
  }
}

inline f32xw infinite_if_negative(f32xw x) { return x < 0.0f ? fill(INFINITY) : x; }

// A (E, S) · log2(e) of the channels in lanes, one vector for each state.
void load_rates(const float* A, int64_t states, int64_t channel, int64_t channels, f32xw* rates) {
  const int64_t count = std::min(WIDTH, channels - channel);
  for (int64_t n = 0; n < states; n++) {
    float lanes[WIDTH] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = A[(channel + i) * states + n] * LOG2_E;
    rates[n] = load_as<f32xw>(lanes);
  }
}

// All that does not need states: from Δ before bias and softplus, which is in `step`, and u, which is in `drive`.
// Gives the longest step in every lane, infinite if one is negative.
inline f32xw start(Chunk& c, int64_t v, f32xw bias, const f32xw* skip, bool softplus) {
  f32xw longest{};
  for (int64_t t = 0; t < c.tokens; t++) {
    const f32xw raw = c.step[v][t] + bias, u = c.drive[v][t], step = softplus ? ptq4vm::softplus(raw) : raw;
    c.step[v][t] = step;
    c.drive[v][t] = step * u;
    c.y[v][t] = skip ? *skip * u : f32xw{};
    longest = larger(longest, softplus ? step : infinite_if_negative(step));
  }
  return longest;
}

void read(Chunk& c, const Window& w) {
  c.tokens = w.tokens;
  c.vectors = vectors_of(w.count);
  for (int64_t t = 0; t < w.tokens; t++) {
    const auto read_row = [&](const Rows& x, f32xw(*to)[CHUNK]) {
      each_vector(x, w.image, w.token + t, w.channel, w.count, [&](int64_t v, f32xw value) { to[v][t] = value; });
    };
    read_row(w.scan.delta, c.step);
    read_row(w.scan.u, c.drive);
  }
}

// States that a chunk finds and leaves in floating point.
struct Floats {
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

// How the states of a chunk's tokens become codes, and the codes of the tokens before them states again.
struct Rounding {
  void begin(const QuantizedScan& q, int64_t token, const Mixing& mixing) {
    const int64_t tokens = std::min(CHUNK, q.scan.tokens - token);
    low = q.low, high = q.high;
    zero_if_finite = 0.0f;
    for (int64_t t = 0; t < tokens; t++) {
      inv_scale[t] = q.state_inv_scale[(token + t) % q.scales];
      // With zero the first token finds no state, whatever codes another image or panel has left.
      scale_before[t] = token + t > 0 ? q.state_scale[(token + t - 1) % q.scales] : 0.0f;
      zero_if_finite += 0.0f * inv_scale[t] + 0.0f * scale_before[t];
    }
    for (int64_t i = 0; i < tokens * q.scan.states; i++) zero_if_finite += 0.0f * mixing.B[i];
  }

  // Not finite either if a state of the chunk may be NaN: Span::any gives those the code 0.
  f32xw longest(const Chunk& c, int64_t v, f32xw step) const {
    for (int64_t t = 0; t < c.tokens; t++) step += 0.0f * c.drive[v][t];
    return step + zero_if_finite;
  }

  float inv_scale[CHUNK], scale_before[CHUNK], zero_if_finite;
  int low, high;
};

// States that are codes from one token to the next: int8 between chunks, floats within one.
struct Codes {
  int8_t* values;
  const Rounding& rounding;
  int low, high;

  Codes(int8_t* values, const Rounding& rounding)
      : values(values), rounding(rounding), low(rounding.low), high(rounding.high) {}

  Grid grid(float inv_scale) const { return {inv_scale, 0, low, high}; }
  f32xw load(int64_t n) const { return load_codes(values + n * WIDTH); }
  void store(int64_t n, f32xw code) const { store_codes(values + n * WIDTH, code, grid(1.0f)); }

  template <Span SPAN>
  f32xw next(f32xw code, f32xw x, f32xw input, int64_t t) const {
    return multiply_add(decay<SPAN>(x, -NORMAL) * rounding.scale_before[t], code, input);
  }

  template <Span SPAN>
  f32xw kept(f32xw state, int64_t t) const {
    const f32xw code = rounded_differences(state, grid(rounding.inv_scale[t]));
    return SPAN == Span::any ? (code == code ? code : f32xw{}) : code;
  }
};

template <Span SPAN, int N, class Kept>
void recur_block(Chunk& c, int64_t v, const Mixing& mixing, int64_t S, int64_t first, const f32xw* rates, Kept states) {
  const float *B = mixing.B.data() + first, *C = mixing.C.data() + first;
  f32xw h[N], rate[N];
  unroll<N>([&](auto n) { h[n] = states.load(n), rate[n] = rates[n]; });
  for (int64_t t = 0; t < c.tokens; t++, B += S, C += S) {
    const f32xw step = c.step[v][t], drive = c.drive[v][t];
    f32xw y = c.y[v][t];
    unroll<N>([&](auto n) {
      const f32xw state = states.template next<SPAN>(h[n], step * rate[n], drive * B[n], t);
      y += state * C[n];
      h[n] = states.template kept<SPAN>(state, t);
    });
    c.y[v][t] = y;
  }
  unroll<N>([&](auto n) { states.store(n, h[n]); });
}

// From the states before the chunk; `carry` is the gradient of those after it, and becomes that of those before it.
template <Span SPAN, int N>
void recur_backward(Chunk& c, const Mixing& mixing, int64_t S, ChunkGrad& grad, int64_t first, const f32xw* rates,
                    const f32xw* states, f32xw* carry, f32xw* grad_rates, f32xw* grad_B, f32xw* grad_C) {
  const float *B = mixing.B.data() + first, *C = mixing.C.data() + first;
  f32xw decays[CHUNK][N], h[CHUNK + 1][N];
  unroll<N>([&](auto n) { h[0][n] = states[n]; });
  {
    f32xw now[N], rate[N];
    unroll<N>([&](auto n) { now[n] = states[n], rate[n] = rates[n]; });
    for (int64_t t = 0; t < c.tokens; t++) {
      const f32xw step = c.step[0][t], drive = c.drive[0][t];
      f32xw y = c.y[0][t];
      unroll<N>([&](auto n) {
        decays[t][n] = decay<SPAN>(step * rate[n], -SMALLEST);
        h[t + 1][n] = now[n] = decays[t][n] * now[n] + drive * B[t * S + n];
        y += now[n] * C[t * S + n];
      });
      c.y[0][t] = y;
    }
  }

  f32xw later[N], rate[N], sum[N];  // sums of chunks are summed: long ones lose less
  unroll<N>([&](auto n) { later[n] = carry[n], rate[n] = rates[n], sum[n] = f32xw{}; });
  for (int64_t t = c.tokens - 1; t >= 0; t--) {
    const f32xw step = c.step[0][t], drive = c.drive[0][t], grad_y = grad.y[t];
    f32xw grad_step = grad.step[t], grad_drive = grad.drive[t];
    f32xw *sum_B = grad_B + t * S + first, *sum_C = grad_C + t * S + first;
    unroll<N>([&](auto n) {
      const f32xw grad_h = grad_y * C[t * S + n] + later[n];
      sum_C[n] += grad_y * h[t + 1][n];
      sum_B[n] += grad_h * drive;
      grad_drive += grad_h * B[t * S + n];
      later[n] = grad_h * decays[t][n];
      const f32xw grad_exponent = later[n] * h[t][n];
      grad_step += grad_exponent * rate[n];
      sum[n] += grad_exponent * step;
    });
    grad.step[t] = grad_step;
    grad.drive[t] = grad_drive;
  }
  unroll<N>([&](auto n) { carry[n] = later[n], grad_rates[n] += sum[n]; });
}

// The states of a panel of channels, and the decays' rates.
struct States {
  States(int64_t vectors, int64_t states, bool quantized = false)
      : S(states), rates(vectors * S), fastest(vectors * S), values(quantized ? 0 : vectors * S),
        codes(quantized ? vectors * S * WIDTH : 0) {}

  void begin(const float* A, int64_t first, int64_t last, int64_t channels) {
    for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
      load_rates(A, S, e, channels, rates.data() + v * S);
      for_states(S, [&](auto n, int64_t first) {
        f32xw& most = fastest[v * S + first] = f32xw{};
        for (int64_t i = 0; i < n; i++) most = larger(most, infinite_if_negative(-rates[v * S + first + i]));
      });
    }
    std::fill(values.begin(), values.end(), f32xw{});
  }

  // The v-th vector of the chunk, which is the at-th of the panel.
  void recur(Chunk& c, int64_t v, f32xw longest, const Mixing& mixing, int64_t at) {
    recur(c, v, longest, mixing, at, [&](int64_t i) { return Floats{&values[i]}; });
  }

  void recur(Chunk& c, int64_t v, f32xw longest, const Mixing& mixing, int64_t at, const Rounding& rounding) {
    recur(c, v, rounding.longest(c, v, longest), mixing, at,
          [&](int64_t i) { return Codes(&codes[i * WIDTH], rounding); });
  }

  int64_t S;
  std::vector<f32xw> rates;    // (vectors, states)
  std::vector<f32xw> fastest;  // of a block of states, at its first; infinite if one grows
  std::vector<f32xw> values;   // (vectors, states), or none
  std::vector<int8_t> codes;   // (vectors, states, WIDTH), or none

 private:
  // kept(i) is a block's states, the first of which is the i-th.
  template <class Kept>
  void recur(Chunk& c, int64_t v, f32xw longest, const Mixing& mixing, int64_t at, Kept kept) {
    for_states(S, [&](auto n, int64_t first) {
      const int64_t i = at * S + first;
      for_span(span_of(longest * fastest[i]),
               [&](auto span) { recur_block<span(), n()>(c, v, mixing, S, first, &rates[i], kept(i)); });
    });
  }
};

// The backward of some images' panels, with the memory it needs.
class Backward {
 public:
  explicit Backward(const ScanBackward& backward)
      : b(backward), s(backward.forward), chunks((s.tokens + CHUNK - 1) / CHUNK),
        vectors(vectors_of(std::min(PANEL, s.channels))), mixing(s.states), states(vectors, s.states),
        carry(vectors * s.states), grad_rates(carry.size()), before(chunks * carry.size()), grad_B(CHUNK * s.states),
        grad_C(CHUNK * s.states), grad_skip(vectors), grad_bias(vectors) {}

  void run(int64_t image, int64_t panel) {
    const int64_t first = panel * PANEL, last = std::min(first + PANEL, s.channels);
    states.begin(s.A, first, last, s.channels);
    for (auto* sums : {&carry, &grad_rates, &grad_skip, &grad_bias}) std::fill(sums->begin(), sums->end(), f32xw{});
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      mixing.read(s, image, chunk * CHUNK);
      for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
        forward({s, image, chunk * CHUNK, e, std::min(e + WIDTH, last)}, chunk, v);
      }
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
      std::fill(grad_B.begin(), grad_B.end(), f32xw{});
      std::fill(grad_C.begin(), grad_C.end(), f32xw{});
      mixing.read(s, image, chunk * CHUNK);
      for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
        backward({s, image, chunk * CHUNK, e, std::min(e + WIDTH, last)}, chunk, v);
      }
      const int64_t at = ((panel * s.batch + image) * s.tokens + chunk * CHUNK) * s.states;
      for (int64_t i = 0; i < std::min(CHUNK, s.tokens - chunk * CHUNK) * s.states; i++) {
        b.B[at + i] = sum(grad_B[i]);
        b.C[at + i] = sum(grad_C[i]);
      }
    }
    for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) finish(image, e, v);
  }

 private:
  void forward(const Window& w, int64_t chunk, int64_t v) {
    std::copy_n(&states.values[v * s.states], s.states, &before[(chunk * vectors + v) * s.states]);
    Chunk c;
    states.recur(c, 0, start(w, c), mixing, v);
  }

  // The chunk is one vector.
  f32xw start(const Window& w, Chunk& c) const {
    const f32xw skip = w.load_channels(s.D);
    read(c, w);
    return PTQ4VM_SET::start(c, 0, w.load_channels(s.delta_bias), s.D ? &skip : nullptr, s.softplus);
  }

  void backward(const Window& w, int64_t chunk, int64_t v) {
    const f32xw skip = w.load_channels(s.D), bias = w.load_channels(s.delta_bias);
    Chunk c;
    ChunkGrad grad;
    f32xw grad_gate[CHUNK];
    const f32xw longest = start(w, c);
    for (int64_t t = 0; t < w.tokens; t++) {
      grad.step[t] = grad.drive[t] = f32xw{};
      grad.y[t] = w.load(b.grad, t);
      if (s.z.data) {
        const Gate gate = silu_with_slope(w.load(s.z, t));
        grad_gate[t] = grad.y[t] * gate.slope;
        grad.y[t] *= gate.value;
      }
    }
    for_states(s.states, [&](auto n, int64_t first) {
      const int64_t at = v * s.states + first;
      for_span(span_of(longest * states.fastest[at], SMALLEST), [&](auto span) {
        recur_backward<span(), n()>(c, mixing, s.states, grad, first, &states.rates[at],
                                    &before[chunk * vectors * s.states + at], &carry[at], &grad_rates[at],
                                    grad_B.data(), grad_C.data());
      });
    });
    f32xw sum_skip{}, sum_bias{};
    for (int64_t t = 0; t < w.tokens; t++) {
      const f32xw u = w.load(s.u, t);
      f32xw grad_delta = grad.step[t] * LN_2 + grad.drive[t] * u;
      if (s.softplus) grad_delta *= sigmoid(w.load(s.delta, t) + bias);
      w.store(b.u, t, grad.drive[t] * c.step[0][t] + grad.y[t] * skip);
      w.store(b.delta, t, grad_delta);
      if (s.z.data) w.store(b.z, t, grad_gate[t] * c.y[0][t]);
      sum_skip += grad.y[t] * u;
      sum_bias += grad_delta;
    }
    grad_skip[v] += sum_skip;
    grad_bias[v] += sum_bias;
  }

  void finish(int64_t image, int64_t channel, int64_t v) {
    const int64_t left = s.channels - channel;
    for (int64_t n = 0; n < s.states; n++) {
      float lanes[WIDTH];
      store_lanes(lanes, grad_rates[v * s.states + n], WIDTH);
      float* to = b.A + (image * s.channels + channel) * s.states + n;
      for (int64_t i = 0; i < std::min(WIDTH, left); i++) to[i * s.states] = lanes[i];
    }
    if (s.D) store_lanes(b.D + image * s.channels + channel, grad_skip[v], left);
    if (s.delta_bias) store_lanes(b.delta_bias + image * s.channels + channel, grad_bias[v], left);
  }

  const ScanBackward& b;
  const Scan& s;
  const int64_t chunks, vectors;
  Mixing mixing;
  States states;
  std::vector<f32xw> carry, grad_rates;     // (vectors, states)
  std::vector<f32xw> before;                // (chunks, vectors, states)
  std::vector<f32xw> grad_B, grad_C;        // (tokens, states), lanes not yet summed
  std::vector<f32xw> grad_skip, grad_bias;  // (vectors,)
};

// The step's integer linear for the tokens of a chunk: their codes are quantized here, and the weight of a panel of
// channels is unpacked once for a direction. Floats hold its sums: |code - zero point| and |code + 128| are below 256,
// |weight| is at most 128, so that 512 products stay within 2^24.
class Steps {
 public:
  Steps(const DirectionalScan& scan, int64_t channels)
      : s(scan), rank(round_up(s.rank, 4)), low_rank(round_up(s.rank, LANES)), inv_smooth(low_rank.size(), 1.0f),
        codes(CHUNK * rank), weight(round_up(channels, LANES) * rank) {}

  void begin(int64_t k, int64_t first, int64_t last) {
    direction = k;
    if (s.step.inv_smooth) std::copy_n(s.step.inv_smooth + k * s.rank, s.rank, inv_smooth.data());
    const int64_t groups = round_up(s.channels, LANES) / LANES, rows = round_up(s.rank, TILE) / 4;
    for (int64_t e = first; e < last; e += LANES) {
      for (int64_t r = 0; r < rank; r += 4) {
        int8_t row[TILE];
        unpack(row, (k * groups + e / LANES) * rows + r / 4);
        set_weight(row, e - first, r);
      }
    }
  }

  // x (R,) of the token; none is a token of zeros.
  void quantize(int64_t t, const float* x, int64_t token) {
    const int64_t i = direction * s.step.scales + token % s.step.scales;
    scale[t] = x ? s.step_scale[i] : 0.0f;
    zero_point[t] = x ? static_cast<float>(s.step.zero_point[i]) : 0.0f;
    const Grid grid(x ? s.step.inv_scale[i] : 0.0f, x ? s.step.zero_point[i] : 0, s.step.low, s.step.high);
    if (x) std::copy_n(x, s.rank, low_rank.data());
    for (int64_t r = 0; r < rank; r += WIDTH) {
      const f32xw value = x ? load_as<f32xw>(&low_rank[r]) * load_as<f32xw>(&inv_smooth[r]) : f32xw{};
      set_codes(rounded_codes(value, grid), t, r);
    }
  }

#ifdef __AVX512VNNI__
  // The result for the v-th vector of the panel's channels, `channel` and after.
  void multiply(f32xw* y, int64_t v, int64_t channel) const {
    __m512i acc[CHUNK];
    unroll<CHUNK>([&](auto t) { acc[t] = __m512i{}; });
    const int8_t* row = &weight[v * rank * LANES];
    for (const uint8_t* x = codes.data(); x < codes.data() + codes.size(); x += 4 * CHUNK, row += TILE) {
      const auto w = load_as<__m512i>(row);
      unroll<CHUNK>(
          [&](auto t) { acc[t] = _mm512_dpbusd_epi32(acc[t], _mm512_set1_epi32(load_as<int32_t>(x + 4 * t)), w); });
    }
    const int64_t at = direction * s.channels + channel, left = s.channels - channel;
    const auto sums = (i32xw)load_lanes(reinterpret_cast<const float*>(s.step_weight_sum) + at, left);
    const f32xw shift = __builtin_convertvector(sums, f32xw), scales = load_lanes(s.step_weight_scale + at, left);
    unroll<CHUNK>([&](auto t) {
      const f32xw exact = __builtin_convertvector((i32xw)acc[t], f32xw) - shift * (zero_point[t] + OFFSET);
      y[t] = (exact * scale[t]) * scales;
    });
  }

 private:
  // dpbusd takes unsigned times signed: codes are OFFSET more than they are. Codes are [R / 4][CHUNK][4], the weight is
  // [channels / 16][R / 4][16][4].
  static constexpr float OFFSET = 128.0f;

  void set_codes(f32xw values, int64_t t, int64_t r) {
    typedef uint8_t u8xw __attribute__((vector_size(WIDTH)));
    const u8xw shifted = __builtin_convertvector(__builtin_convertvector(values + OFFSET, i32xw), u8xw);
    for (int64_t i = 0; i < std::min(WIDTH, rank - r); i += 4) {
      std::memcpy(&codes[((r + i) / 4 * CHUNK + t) * 4], reinterpret_cast<const uint8_t*>(&shifted) + i, 4);
    }
  }

  void set_weight(const int8_t* lanes, int64_t channel, int64_t r) {
    std::copy_n(lanes, TILE, &weight[channel * rank + r / 4 * TILE]);
  }

  using Code = uint8_t;
  using Weight = int8_t;
#else
  void multiply(f32xw* y, int64_t v, int64_t channel) const {
    const int64_t at = direction * s.channels + channel;
    const f32xw scales = load_lanes(s.step_weight_scale + at, s.channels - channel);
    constexpr int ROWS = 4;
    for (int64_t t0 = 0; t0 < CHUNK; t0 += ROWS) {
      f32xw acc[ROWS];
      unroll<ROWS>([&](auto t) { acc[t] = f32xw{}; });
      for (int64_t r = 0; r < rank; r++) {
        const auto w = load_as<f32xw>(&weight[(v * rank + r) * WIDTH]);
        unroll<ROWS>([&](auto t) { acc[t] += w * codes[(t0 + t) * rank + r]; });
      }
      unroll<ROWS>([&](auto t) { y[t0 + t] = (acc[t] * scale[t0 + t]) * scales; });
    }
  }

 private:
  void set_codes(f32xw values, int64_t t, int64_t r) {
    store_lanes(&codes[t * rank + r], values - zero_point[t], rank - r);
  }

  // [channels / WIDTH][R][WIDTH]
  void set_weight(const int8_t* lanes, int64_t channel, int64_t r) {
    for (int64_t e = channel; e < channel + LANES; e++) {
      for (int64_t i = 0; i < 4; i++) weight[(e / WIDTH * rank + r + i) * WIDTH + e % WIDTH] = *lanes++;
    }
  }

  using Code = float;
  using Weight = float;
#endif

  static int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

  // A row of the packed weight.
  void unpack(int8_t* to, int64_t row) const {
    if (!s.packed) {
      std::copy_n(static_cast<const int8_t*>(s.step_weight) + row * TILE, TILE, to);
      return;
    }
    const uint8_t* from = static_cast<const uint8_t*>(s.step_weight) + row * (TILE / 2);
    for (int64_t i = 0; i < TILE / 2; i++) {
      to[i] = static_cast<int8_t>(((from[i] & 15) ^ 8) - 8);
      to[i + TILE / 2] = static_cast<int8_t>(((from[i] >> 4) ^ 8) - 8);
    }
  }

  const DirectionalScan& s;
  const int64_t rank;
  int64_t direction = 0;
  std::vector<float> low_rank, inv_smooth;
  std::vector<Code> codes;
  std::vector<Weight> weight;
  float scale[CHUNK] = {};
  float zero_point[CHUNK] = {};
};

// The scans of some images' panels, with the memory they need.
class Directions {
 public:
  explicit Directions(const DirectionalScan& scan)
      : s(scan), vectors(vectors_of(s.panel)), mixing(s.states), states(vectors, s.states), steps(s, s.panel),
        sums(s.tokens * vectors) {}

  void run(int64_t image, int64_t panel) {
    const int64_t first = panel * s.panel, last = std::min(first + s.panel, s.channels);
    std::fill(sums.begin(), sums.end(), f32xw{});
    for (int64_t k = 0; k < s.directions; k++) {
      states.begin(s.A + k * s.channels * s.states, first, last, s.channels);
      steps.begin(k, first, last);
      for (int64_t t = 0; t < s.steps; t += CHUNK) chunk(k, image, t, first, last);
      if (!s.merge) {
        finish(k * s.batch + image, image, first, last);
        std::fill(sums.begin(), sums.end(), f32xw{});
      }
    }
    if (s.merge) finish(image, image, first, last);
  }

 private:
  void chunk(int64_t k, int64_t image, int64_t begin, int64_t first, int64_t last) {
    const int32_t* tokens = s.order + k * s.steps + begin;
    Chunk c;
    c.tokens = std::min(CHUNK, s.steps - begin);
    for (int64_t t = 0; t < c.tokens; t++) {
      const int64_t S = s.states, row = (k * s.batch + image) * s.tokens + tokens[t];
      const float* x = tokens[t] < 0 ? nullptr : s.projected + row * (s.rank + 2 * S);
      steps.quantize(t, x, tokens[t]);
      mixing.set(t, S, x ? x + s.rank : nullptr);
    }
    for (int64_t e = first, at = 0; e < last; e += STRIP * WIDTH, at += STRIP) {
      const int64_t count = std::min(STRIP * WIDTH, last - e), row = k * s.channels + e;
      c.vectors = vectors_of(count);
      for (int64_t t = 0; t < c.tokens; t++) {
        if (tokens[t] < 0) {
          for (int64_t v = 0; v < c.vectors; v++) c.drive[v][t] = f32xw{};
        } else {
          each_vector(s.u, image, tokens[t], k * s.u_direction + e, count,
                      [&](int64_t v, f32xw u) { c.drive[v][t] = u; });
        }
      }
      for (int64_t v = 0; v < c.vectors; v++) {
        const int64_t left = count - v * WIDTH;
        const f32xw skip = s.D ? load_lanes(s.D + row + v * WIDTH, left) : f32xw{};
        steps.multiply(c.step[v], at + v, e + v * WIDTH);
        const f32xw longest = start(c, v, load_lanes(s.step_bias + row + v * WIDTH, left), s.D ? &skip : nullptr, true);
        states.recur(c, v, longest, mixing, at + v);
      }
      for (int64_t t = 0; t < c.tokens; t++) {
        if (tokens[t] < 0) continue;
        f32xw* sum = &sums[tokens[t] * vectors + at];
        for (int64_t v = 0; v < c.vectors; v++) sum[v] += c.y[v][t];
      }
    }
  }

  // The gate of an image, and the panel's part of the results, which are those of the to-th image there.
  void finish(int64_t to, int64_t image, int64_t first, int64_t last) {
    for (int64_t token = 0; token < s.tokens; token++) {
      const int64_t at = (to * s.tokens + token) * s.channels + first;
      f32xw* y = &sums[token * vectors];
      if (s.z.data) {
        each_vector(s.z, image, token, first, last - first, [&](int64_t v, f32xw z) { y[v] *= silu(z) * s.factor; });
      } else {
        for (int64_t v = 0; v < vectors; v++) y[v] *= s.factor;
      }
      if (s.codes) {
        const Grid grid(s.qparams, token);
        const float* smooth = s.qparams.inv_smooth ? s.qparams.inv_smooth + first : nullptr;
        for (int64_t v = 0; v < vectors_of(last - first); v++) {
          const int64_t left = last - first - v * WIDTH;
          const f32xw value = smooth ? y[v] * load_lanes(smooth + v * WIDTH, left) : y[v];
          store_codes(s.codes + at + v * WIDTH, value, grid, left);
        }
      } else {
        write_vectors(s.y, s.y_type, at, last - first, [&](int64_t v) { return y[v]; });
      }
    }
  }

  const DirectionalScan& s;
  const int64_t vectors;
  Mixing mixing;
  States states;
  Steps steps;
  std::vector<f32xw> sums;  // (tokens, vectors)
};

// `quantized` is null, or has the scan.
void scan_groups(const Scan& s, const QuantizedScan* quantized, int64_t begin, int64_t end) {
  const int64_t groups = (s.channels + LANES - 1) / LANES;
  Mixing mixing(s.states);
  States states(std::min(groups, end - begin) * LANES / WIDTH, s.states, quantized);
  Rounding rounding;
  Chunk c;
  while (begin < end) {
    const int64_t image = begin / groups, first = begin % groups * LANES;
    const int64_t last = std::min(s.channels, first + (end - begin) * LANES);
    begin += (last - first + LANES - 1) / LANES;
    states.begin(s.A, first, last, s.channels);
    // All channels take a chunk before any takes the next: memory is read row by row.
    for (int64_t token = 0; token < s.tokens; token += CHUNK) {
      mixing.read(s, image, token);
      if (quantized) rounding.begin(*quantized, token, mixing);
      for (int64_t e = first, at = 0; e < last; e += STRIP * WIDTH, at += STRIP) {
        const Window w(s, image, token, e, std::min(e + STRIP * WIDTH, last));
        read(c, w);
        for (int64_t v = 0; v < c.vectors; v++) {
          const int64_t channel = e + v * WIDTH, left = last - channel;
          const f32xw skip = s.D ? load_lanes(s.D + channel, left) : f32xw{};
          const f32xw bias = s.delta_bias ? load_lanes(s.delta_bias + channel, left) : f32xw{};
          const f32xw longest = start(c, v, bias, s.D ? &skip : nullptr, s.softplus);
          if (quantized) {
            states.recur(c, v, longest, mixing, at + v, rounding);
          } else {
            states.recur(c, v, longest, mixing, at + v);
          }
        }
        for (int64_t t = 0; t < w.tokens; t++) {
          if (s.z.data) {
            each_vector(s.z, image, token + t, e, w.count, [&](int64_t v, f32xw z) { c.y[v][t] *= silu(z); });
          }
          write_vectors(s.y, s.y_type, w.at(t), w.count, [&](int64_t v) { return c.y[v][t]; });
        }
      }
    }
  }
}

}  // namespace

void scan(const Scan& s, int64_t begin, int64_t end) { scan_groups(s, nullptr, begin, end); }

void scan_quantized(const QuantizedScan& q, int64_t begin, int64_t end) { scan_groups(q.scan, &q, begin, end); }

void scan_backward(const ScanBackward& b, int64_t begin, int64_t end) {
  const int64_t panels = (b.forward.channels + PANEL - 1) / PANEL;
  Backward backward(b);
  for (int64_t item = begin; item < end; item++) backward.run(item / panels, item % panels);
}

void directional_scan(const DirectionalScan& s, int64_t begin, int64_t end) {
  const int64_t panels = (s.channels + s.panel - 1) / s.panel;
  Directions directions(s);
  for (int64_t item = begin; item < end; item++) directions.run(item / panels, item % panels);
}

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
