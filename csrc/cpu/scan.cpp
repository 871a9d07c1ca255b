// reference.selective_scan and reference.selective_scan_backward in float32: outputs and gradients differ from those in
// float64 by about 1e-6 of the largest. Sums over channels and tokens have one order, whatever the division of work.
// Channels lie in lanes, B and C of a token are broadcast. A chunk of tokens goes through three stages: what needs no
// state, the recurrence with a block of states in registers, and the gate.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "math.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

constexpr int64_t CHUNK = 16;   // tokens; their states and the sums over channels fit the first cache
constexpr int BLOCK = 8;        // states
constexpr int64_t PANEL = 256;  // channels whose states before every chunk are kept: 3 MiB for 3136 tokens, 16 states

constexpr float LOG2_E = 1.442695041f, LN_2 = 0.6931471806f;

// Tokens and channels of one image, as many channels as there are lanes, or all that are left.
struct Window {
  const Scan& scan;
  int64_t row, tokens;    // rows are (batch · tokens)
  int64_t channel, left;  // channels from this one on

  Window(const Scan& s, int64_t image, int64_t token, int64_t first)
      : scan(s), row(image * s.tokens + token), tokens(std::min(CHUNK, s.tokens - token)), channel(first),
        left(s.channels - first) {}

  int64_t at(int64_t t) const { return (row + t) * scan.channels + channel; }
  f32xw load(const float* x, int64_t t) const { return load_lanes(x + at(t), left); }
  void store(float* x, int64_t t, f32xw value) const { store_lanes(x + at(t), value, left); }
  f32xw load_channels(const float* x) const { return x ? load_lanes(x + channel, left) : f32xw{}; }
};

struct Chunk {
  f32xw step[CHUNK], drive[CHUNK], y[CHUNK];  // Δ, Δ · u, and y before the gate
};

struct ChunkGrad {
  f32xw step[CHUNK], drive[CHUNK], y[CHUNK];
};

// work(N, first) for blocks of N states; N is a constant, smaller for the last ones.
template <int N = BLOCK, class Work>
inline void for_states(int64_t states, Work work, int64_t first = 0) {
  for (; first + N <= states; first += N) work(std::integral_constant<int, N>(), first);
  if constexpr (N > 1) for_states<N / 2>(states, work, first);
}

// A · log2(e) of the channels in lanes, one vector for each state.
void load_rates(const Scan& s, int64_t channel, f32xw* rates) {
  const int64_t count = std::min(WIDTH, s.channels - channel);
  for (int64_t n = 0; n < s.states; n++) {
    float lanes[WIDTH] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = s.A[(channel + i) * s.states + n] * LOG2_E;
    rates[n] = load_as<f32xw>(lanes);
  }
}

// All that does not need states.
void start(const Window& w, Chunk& c) {
  const Scan& s = w.scan;
  const f32xw bias = w.load_channels(s.delta_bias), skip = w.load_channels(s.D);
  for (int64_t t = 0; t < w.tokens; t++) {
    const f32xw raw = w.load(s.delta, t) + bias, u = w.load(s.u, t);
    c.step[t] = s.softplus ? softplus(raw) : raw;
    c.drive[t] = c.step[t] * u;
    c.y[t] = s.D ? skip * u : f32xw{};
  }
}

template <int N>
void recur(const Window& w, Chunk& c, int64_t first, const f32xw* rates, f32xw* states) {
  const int64_t S = w.scan.states;
  const float *B = w.scan.B + w.row * S + first, *C = w.scan.C + w.row * S + first;
  f32xw h[N];
  for (int n = 0; n < N; n++) h[n] = states[n];
  for (int64_t t = 0; t < w.tokens; t++, B += S, C += S) {
    const f32xw step = c.step[t], drive = c.drive[t];
    f32xw y = c.y[t];
    for (int n = 0; n < N; n++) {
      h[n] = exp2(step * rates[n]) * h[n] + drive * B[n];
      y += h[n] * C[n];
    }
    c.y[t] = y;
  }
  for (int n = 0; n < N; n++) states[n] = h[n];
}

// From the states before the chunk; `carry` is the gradient of those after it, and becomes that of those before it.
template <int N>
void recur_backward(const Window& w, Chunk& c, ChunkGrad& grad, int64_t first, const f32xw* rates, const f32xw* states,
                    f32xw* carry, f32xw* grad_rates, f32xw* grad_B, f32xw* grad_C) {
  const int64_t S = w.scan.states;
  const float *B = w.scan.B + w.row * S + first, *C = w.scan.C + w.row * S + first;
  f32xw decay[CHUNK][N], h[CHUNK + 1][N];
  for (int n = 0; n < N; n++) h[0][n] = states[n];
  for (int64_t t = 0; t < w.tokens; t++) {
    const f32xw step = c.step[t], drive = c.drive[t];
    f32xw y = c.y[t];
    for (int n = 0; n < N; n++) {
      decay[t][n] = exp2(step * rates[n], -64.0f);  // less would make denormal gradients, which are slow
      h[t + 1][n] = decay[t][n] * h[t][n] + drive * B[t * S + n];
      y += h[t + 1][n] * C[t * S + n];
    }
    c.y[t] = y;
  }

  f32xw later[N], sum[N] = {};  // sums of chunks are summed: long ones lose less
  for (int n = 0; n < N; n++) later[n] = carry[n];
  for (int64_t t = w.tokens - 1; t >= 0; t--) {
    const f32xw step = c.step[t], drive = c.drive[t], grad_y = grad.y[t];
    f32xw grad_step = grad.step[t], grad_drive = grad.drive[t];
    f32xw *sum_B = grad_B + t * S + first, *sum_C = grad_C + t * S + first;
    for (int n = 0; n < N; n++) {
      const f32xw grad_h = grad_y * C[t * S + n] + later[n];
      sum_C[n] += grad_y * h[t + 1][n];
      sum_B[n] += grad_h * drive;
      grad_drive += grad_h * B[t * S + n];
      later[n] = grad_h * decay[t][n];
      const f32xw grad_exponent = later[n] * h[t][n];
      grad_step += grad_exponent * rates[n];
      sum[n] += grad_exponent * step;
    }
    grad.step[t] = grad_step;
    grad.drive[t] = grad_drive;
  }
  for (int n = 0; n < N; n++) carry[n] = later[n];
  for (int n = 0; n < N; n++) grad_rates[n] += sum[n];
}

void recur(const Window& w, Chunk& c, const f32xw* rates, f32xw* states) {
  for_states(w.scan.states, [&](auto n, int64_t first) { recur<n()>(w, c, first, rates + first, states + first); });
}

// The backward of some images, with the memory it needs.
class Backward {
 public:
  explicit Backward(const ScanBackward& backward)
      : b(backward), s(backward.forward), chunks((s.tokens + CHUNK - 1) / CHUNK),
        vectors((std::min(PANEL, s.channels) + WIDTH - 1) / WIDTH), rates(vectors * s.states), states(rates.size()),
        carry(rates.size()), grad_rates(rates.size()), before(chunks * vectors * s.states), grad_B(CHUNK * s.states),
        grad_C(CHUNK * s.states), grad_skip(vectors), grad_bias(vectors) {}

  void run(int64_t image) {
    std::fill_n(b.B + image * s.tokens * s.states, s.tokens * s.states, 0.0f);
    std::fill_n(b.C + image * s.tokens * s.states, s.tokens * s.states, 0.0f);
    for (int64_t first = 0; first < s.channels; first += PANEL) {
      const int64_t last = std::min(first + PANEL, s.channels);
      for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) load_rates(s, e, &rates[v * s.states]);
      for (auto* sums : {&states, &carry, &grad_rates, &grad_skip, &grad_bias}) {
        std::fill(sums->begin(), sums->end(), f32xw{});
      }
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) forward({s, image, chunk * CHUNK, e}, chunk, v);
      }
      for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        std::fill(grad_B.begin(), grad_B.end(), f32xw{});
        std::fill(grad_C.begin(), grad_C.end(), f32xw{});
        for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) backward({s, image, chunk * CHUNK, e}, chunk, v);
        const Window w(s, image, chunk * CHUNK, first);
        for (int64_t i = 0; i < w.tokens * s.states; i++) {
          b.B[w.row * s.states + i] += sum(grad_B[i]);
          b.C[w.row * s.states + i] += sum(grad_C[i]);
        }
      }
      for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) finish(image, e, v);
    }
  }

 private:
  void forward(const Window& w, int64_t chunk, int64_t v) {
    std::copy_n(&states[v * s.states], s.states, &before[(chunk * vectors + v) * s.states]);
    Chunk c;
    start(w, c);
    recur(w, c, &rates[v * s.states], &states[v * s.states]);
  }

  void backward(const Window& w, int64_t chunk, int64_t v) {
    const f32xw skip = w.load_channels(s.D), bias = w.load_channels(s.delta_bias);
    Chunk c;
    ChunkGrad grad;
    f32xw grad_gate[CHUNK];
    start(w, c);
    for (int64_t t = 0; t < w.tokens; t++) {
      grad.step[t] = grad.drive[t] = f32xw{};
      grad.y[t] = w.load(b.grad, t);
      if (s.z) {
        const Gate gate = silu_with_slope(w.load(s.z, t));
        grad_gate[t] = grad.y[t] * gate.slope;
        grad.y[t] *= gate.value;
      }
    }
    for_states(s.states, [&](auto n, int64_t first) {
      const int64_t at = v * s.states + first;
      recur_backward<n()>(w, c, grad, first, &rates[at], &before[chunk * vectors * s.states + at], &carry[at],
                          &grad_rates[at], grad_B.data(), grad_C.data());
    });
    f32xw sum_skip{}, sum_bias{};
    for (int64_t t = 0; t < w.tokens; t++) {
      const f32xw u = w.load(s.u, t);
      f32xw grad_delta = grad.step[t] * LN_2 + grad.drive[t] * u;
      if (s.softplus) grad_delta *= sigmoid(w.load(s.delta, t) + bias);
      w.store(b.u, t, grad.drive[t] * c.step[t] + grad.y[t] * skip);
      w.store(b.delta, t, grad_delta);
      if (s.z) w.store(b.z, t, grad_gate[t] * c.y[t]);
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
  std::vector<f32xw> rates, states, carry, grad_rates;  // (vectors, states)
  std::vector<f32xw> before;                            // (chunks, vectors, states)
  std::vector<f32xw> grad_B, grad_C;                    // (tokens, states), lanes not yet summed
  std::vector<f32xw> grad_skip, grad_bias;              // (vectors,)
};

}  // namespace

void scan(const Scan& s, int64_t begin, int64_t end) {
  const int64_t groups = (s.channels + LANES - 1) / LANES;
  std::vector<f32xw> rates(std::min(groups, end - begin) * LANES / WIDTH * s.states), states(rates.size());
  while (begin < end) {
    const int64_t image = begin / groups, first = begin % groups * LANES;
    const int64_t last = std::min(s.channels, first + (end - begin) * LANES);
    begin += (last - first + LANES - 1) / LANES;
    for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) load_rates(s, e, &rates[v * s.states]);
    std::fill(states.begin(), states.end(), f32xw{});
    // All channels take a chunk before any takes the next: memory is read row by row.
    for (int64_t token = 0; token < s.tokens; token += CHUNK) {
      for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
        const Window w(s, image, token, e);
        Chunk c;
        start(w, c);
        recur(w, c, &rates[v * s.states], &states[v * s.states]);
        for (int64_t t = 0; t < w.tokens; t++) w.store(s.y, t, s.z ? c.y[t] * silu(w.load(s.z, t)) : c.y[t]);
      }
    }
  }
}

void scan_backward(const ScanBackward& b, int64_t begin, int64_t end) {
  Backward backward(b);
  for (int64_t image = begin; image < end; image++) backward.run(image);
}

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
