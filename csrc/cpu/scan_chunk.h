// A chunk of tokens of a scan: what is read and written of it, and all that needs no state. Channels lie in lanes, B
// and C of a token are broadcast.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "math.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

constexpr int64_t CHUNK = 16;  // tokens; their states and the sums over channels fit the first cache

// Vectors of neighbouring channels, and tokens of one image: whole lines of memory are read and written.
constexpr int64_t STRIP = 4;

struct ScanChunk {
  int64_t tokens, vectors;
  f32xw dt[STRIP][CHUNK], dt_u[STRIP][CHUNK], y[STRIP][CHUNK];  // Δ, Δ · u, and y before the gate
};

// Calls use(v, value) for the vectors of `count` channels that begin at an element; lanes beyond are zero.
template <class T, class Use>
inline void each_vector(const T* from, int64_t count, Use use) {
  int64_t v = 0;
  for (; (v + 1) * WIDTH <= count; v++) use(v, load_lanes(from + v * WIDTH, WIDTH));
  if (v * WIDTH < count) use(v, load_lanes(from + v * WIDTH, count - v * WIDTH));
}

template <class Use>
inline void each_vector(const Rows& x, int64_t image, int64_t token, int64_t channel, int64_t count, Use use) {
  const int64_t at = image * x.image + token * x.row + channel;
  with_type(x.type, [&](auto t) { each_vector(static_cast<const decltype(t)*>(x.data) + at, count, use); });
}

template <class T, class Make>
inline void write_vectors(T* to, int64_t count, Make make) {
  int64_t v = 0;
  for (; (v + 1) * WIDTH <= count; v++) store_lanes(to + v * WIDTH, make(v), WIDTH);
  if (v * WIDTH < count) store_lanes(to + v * WIDTH, make(v), count - v * WIDTH);
}

// Writes make(v) to the vectors of `count` channels that begin at an element.
template <class Make>
inline void write_vectors(void* to, Float type, int64_t at, int64_t count, Make make) {
  with_type(type, [&](auto t) { write_vectors(static_cast<decltype(t)*>(to) + at, count, make); });
}

// The tokens and channels of one image.
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

// B and C of a chunk's tokens: (tokens, states).
struct ScanCoefficients {
  explicit ScanCoefficients(int64_t states) : B(CHUNK * states), C(CHUNK * states) {}
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

  // Sets B and C, one after the other; null stands for zeros.
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

inline f32xw infinite_if_negative(f32xw x) { return x < 0.0f ? fill(INFINITY) : x; }

// Computes all that does not need states: from Δ before bias and softplus, which is in `dt`, and u, which is in `dt_u`.
// Returns the longest dt in every lane, infinite if one is negative.
inline f32xw prepare_chunk(ScanChunk& c, int64_t v, f32xw bias, const f32xw* skip, bool softplus) {
  f32xw longest{};
  for (int64_t t = 0; t < c.tokens; t++) {
    const f32xw raw = c.dt[v][t] + bias, u = c.dt_u[v][t], dt = softplus ? ptq4vm::softplus(raw) : raw;
    c.dt[v][t] = dt;
    c.dt_u[v][t] = dt * u;
    c.y[v][t] = skip ? *skip * u : f32xw{};
    longest = larger(longest, softplus ? dt : infinite_if_negative(dt));
  }
  return longest;
}

inline void read_chunk(ScanChunk& c, const Window& w) {
  c.tokens = w.tokens;
  c.vectors = vectors_of(w.count);
  for (int64_t t = 0; t < w.tokens; t++) {
    const auto read_row = [&](const Rows& x, f32xw(*to)[CHUNK]) {
      each_vector(x, w.image, w.token + t, w.channel, w.count, [&](int64_t v, f32xw value) { to[v][t] = value; });
    };
    read_row(w.scan.delta, c.dt);
    read_row(w.scan.u, c.dt_u);
  }
}

}  // namespace
}  // namespace ptq4vm::PTQ4VM_SET
