// The adjoint of ops.selective_scan in float32: gradients differ from those in float64 by about 1e-6 of the
// largest. Sums over channels and tokens have one order, whatever the division of work.
#include "scan_states.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

struct ChunkGradients {
  f32xw dt[CHUNK], dt_u[CHUNK], y[CHUNK];
};

// From the states before the chunk; `carry` is the gradient of those after it, and becomes that of those before it.
template <Span SPAN, int N>
void recur_backward(ScanChunk& c, const ScanCoefficients& coefficients, int64_t S, ChunkGradients& grad, int64_t first,
                    const f32xw* rates, const f32xw* states, f32xw* carry, f32xw* grad_rates, f32xw* grad_B,
                    f32xw* grad_C) {
  const float *B = coefficients.B.data() + first, *C = coefficients.C.data() + first;
  f32xw decays[CHUNK][N], h[CHUNK + 1][N];
  unroll<N>([&](auto n) { h[0][n] = states[n]; });
  {
    f32xw now[N], rate[N];
    unroll<N>([&](auto n) { now[n] = states[n], rate[n] = rates[n]; });
    for (int64_t t = 0; t < c.tokens; t++) {
      const f32xw dt = c.dt[0][t], dt_u = c.dt_u[0][t];
      f32xw y = c.y[0][t];
      unroll<N>([&](auto n) {
        decays[t][n] = decay<SPAN>(dt * rate[n], -SMALLEST);
        h[t + 1][n] = now[n] = decays[t][n] * now[n] + dt_u * B[t * S + n];
        y += now[n] * C[t * S + n];
      });
      c.y[0][t] = y;
    }
  }

  f32xw later[N], rate[N], sum[N];  // sums of chunks are summed: long ones lose less
  unroll<N>([&](auto n) { later[n] = carry[n], rate[n] = rates[n], sum[n] = f32xw{}; });
  for (int64_t t = c.tokens - 1; t >= 0; t--) {
    const f32xw dt = c.dt[0][t], dt_u = c.dt_u[0][t], grad_y = grad.y[t];
    f32xw grad_dt = grad.dt[t], grad_dt_u = grad.dt_u[t];
    f32xw *sum_B = grad_B + t * S + first, *sum_C = grad_C + t * S + first;
    unroll<N>([&](auto n) {
      const f32xw grad_h = grad_y * C[t * S + n] + later[n];
      sum_C[n] += grad_y * h[t + 1][n];
      sum_B[n] += grad_h * dt_u;
      grad_dt_u += grad_h * B[t * S + n];
      later[n] = grad_h * decays[t][n];
      const f32xw grad_exponent = later[n] * h[t][n];
      grad_dt += grad_exponent * rate[n];
      sum[n] += grad_exponent * dt;
    });
    grad.dt[t] = grad_dt;
    grad.dt_u[t] = grad_dt_u;
  }
  unroll<N>([&](auto n) { carry[n] = later[n], grad_rates[n] += sum[n]; });
}

// The backward of some images' panels, with the memory it needs.
class ScanGradients {
 public:
  explicit ScanGradients(const ScanBackward& backward)
      : b(backward), s(backward.forward), chunks(divided_up(s.tokens, CHUNK)),
        vectors(vectors_of(std::min(PANEL, s.channels))), coefficients(s.states), states(vectors, s.states),
        carry(vectors * s.states), grad_rates(carry.size()), before(chunks * carry.size()), grad_B(CHUNK * s.states),
        grad_C(CHUNK * s.states), grad_skip(vectors), grad_bias(vectors) {}

  void run(int64_t image, int64_t panel) {
    const int64_t first = panel * PANEL, last = std::min(first + PANEL, s.channels);
    states.begin(s.A, first, last, s.channels);
    for (auto* sums : {&carry, &grad_rates, &grad_skip, &grad_bias}) std::fill(sums->begin(), sums->end(), f32xw{});
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      coefficients.read(s, image, chunk * CHUNK);
      for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
        forward({s, image, chunk * CHUNK, e, std::min(e + WIDTH, last)}, chunk, v);
      }
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
      std::fill(grad_B.begin(), grad_B.end(), f32xw{});
      std::fill(grad_C.begin(), grad_C.end(), f32xw{});
      coefficients.read(s, image, chunk * CHUNK);
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
    ScanChunk c;
    states.recur(c, 0, start(w, c), coefficients, v);
  }

  // The chunk is one vector.
  f32xw start(const Window& w, ScanChunk& c) const {
    const f32xw skip = w.load_channels(s.D);
    read_chunk(c, w);
    return PTQ4VM_SET::prepare_chunk(c, 0, w.load_channels(s.delta_bias), s.D ? &skip : nullptr, s.softplus);
  }

  void backward(const Window& w, int64_t chunk, int64_t v) {
    const f32xw skip = w.load_channels(s.D), bias = w.load_channels(s.delta_bias);
    ScanChunk c;
    ChunkGradients grad;
    f32xw grad_gate[CHUNK];
    const f32xw longest = start(w, c);
    for (int64_t t = 0; t < w.tokens; t++) {
      grad.dt[t] = grad.dt_u[t] = f32xw{};
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
        recur_backward<span(), n()>(c, coefficients, s.states, grad, first, &states.rates[at],
                                    &before[chunk * vectors * s.states + at], &carry[at], &grad_rates[at],
                                    grad_B.data(), grad_C.data());
      });
    });
    f32xw sum_skip{}, sum_bias{};
    for (int64_t t = 0; t < w.tokens; t++) {
      const f32xw u = w.load(s.u, t);
      f32xw grad_delta = grad.dt[t] * LN_2 + grad.dt_u[t] * u;
      if (s.softplus) grad_delta *= sigmoid(w.load(s.delta, t) + bias);
      w.store(b.u, t, grad.dt_u[t] * c.dt[0][t] + grad.y[t] * skip);
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
    store_columns(b.A + (image * s.channels + channel) * s.states, s.states, left, grad_rates.data() + v * s.states);
    if (s.D) store_lanes(b.D + image * s.channels + channel, grad_skip[v], left);
    if (s.delta_bias) store_lanes(b.delta_bias + image * s.channels + channel, grad_bias[v], left);
  }

  const ScanBackward& b;
  const Scan& s;
  const int64_t chunks, vectors;
  ScanCoefficients coefficients;
  PanelStates states;
  std::vector<f32xw> carry, grad_rates;     // (vectors, states)
  std::vector<f32xw> before;                // (chunks, vectors, states)
  std::vector<f32xw> grad_B, grad_C;        // (tokens, states), lanes not yet summed
  std::vector<f32xw> grad_skip, grad_bias;  // (vectors,)
};

}  // namespace

void run(const ScanBackward& b, int64_t begin, int64_t end) {
  const int64_t panels = divided_up(b.forward.channels, PANEL);
  ScanGradients backward(b);
  for (int64_t item = begin; item < end; item++) backward.run(item / panels, item % panels);
}

}  // namespace ptq4vm::PTQ4VM_SET
