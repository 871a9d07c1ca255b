// The scans and causal_conv1d for float64, in plain loops: gradients are checked with them. Layouts as in operators.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../bindings/tensors.h"

namespace ptq4vm::float64 {

struct Scan {
  const double *u, *delta, *A, *B, *C, *D, *z, *delta_bias;
  int64_t batch, tokens, channels, states;
  bool softplus;
  const double *state_scale = nullptr, *state_inv_scale = nullptr;  // as in QuantizedScan
  int64_t scales = 1;
  double low = 0, high = 0;

  template <class Inputs>  // ScanInputs
  explicit Scan(const Inputs& i)
      : u(const_ptr<double>(i.u)), delta(const_ptr<double>(i.delta)), A(const_ptr<double>(i.A)),
        B(const_ptr<double>(i.B)), C(const_ptr<double>(i.C)), D(const_ptr<double>(i.D)), z(const_ptr<double>(i.z)),
        delta_bias(const_ptr<double>(i.delta_bias)), batch(i.scan.batch), tokens(i.scan.tokens),
        channels(i.scan.channels), states(i.scan.states), softplus(i.scan.softplus) {}
};

// Returns what token t hands to the next of a state; NaN is the code 0.
inline double kept(const Scan& s, double state, int64_t t) {
  if (!s.state_scale) return state;
  const double code = std::nearbyint(state * s.state_inv_scale[t % s.scales]);
  return (code == code ? std::clamp(code, s.low, s.high) : 0) * s.state_scale[t % s.scales];
}

struct Gradients {
  double *u, *delta, *A, *B, *C, *D, *z, *delta_bias;  // zeros at first; the last three may be null
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Fills dt and the states of all tokens of an image and channel, and hands the outputs before the gate to `use`.
template <class Use>
void scan_channel(const Scan& s, int64_t b, int64_t e, std::vector<double>& dts, std::vector<double>& states,
                  const Use& use) {
  for (int64_t t = 0; t < s.tokens; t++) {
    const int64_t at = (b * s.tokens + t) * s.channels + e, row = (b * s.tokens + t) * s.states;
    const double raw = s.delta[at] + (s.delta_bias ? s.delta_bias[e] : 0);
    const double dt = dts[t] = s.softplus && raw <= 20 ? std::log1p(std::exp(raw)) : raw;
    double y = s.D ? s.D[e] * s.u[at] : 0;
    for (int64_t n = 0; n < s.states; n++) {
      const double before = t ? states[(t - 1) * s.states + n] : 0;
      const double h = std::exp(dt * s.A[e * s.states + n]) * before + dt * s.B[row + n] * s.u[at];
      states[t * s.states + n] = kept(s, h, t);
      y += s.C[row + n] * h;
    }
    use(t, at, raw, y);
  }
}

inline void scan(const Scan& s, double* out) {
  std::vector<double> dts(s.tokens), states(s.tokens * s.states);
  for (int64_t b = 0; b < s.batch; b++) {
    for (int64_t e = 0; e < s.channels; e++) {
      scan_channel(s, b, e, dts, states,
                   [&](int64_t, int64_t at, double, double y) { out[at] = s.z ? y * s.z[at] * sigmoid(s.z[at]) : y; });
    }
  }
}

inline void scan_backward(const Scan& s, const double* grad, const Gradients& d) {
  std::vector<double> dts(s.tokens), states(s.tokens * s.states), raws(s.tokens), inner(s.tokens), carry(s.states);
  for (int64_t b = 0; b < s.batch; b++) {
    for (int64_t e = 0; e < s.channels; e++) {
      scan_channel(s, b, e, dts, states, [&](int64_t t, int64_t at, double raw, double y) {
        const double gate = s.z ? sigmoid(s.z[at]) : 1;
        raws[t] = raw;
        inner[t] = grad[at] * (s.z ? s.z[at] * gate : 1);
        if (d.z) d.z[at] = grad[at] * y * gate * (1 + s.z[at] * (1 - gate));
      });
      carry.assign(s.states, 0);
      for (int64_t t = s.tokens - 1; t >= 0; t--) {
        const int64_t at = (b * s.tokens + t) * s.channels + e, row = (b * s.tokens + t) * s.states;
        double ddt = 0, ddt_u = 0;
        for (int64_t n = 0; n < s.states; n++) {
          const double a = s.A[e * s.states + n], decay = std::exp(dts[t] * a);
          const double before = t ? states[(t - 1) * s.states + n] : 0;
          const double adjoint = s.C[row + n] * inner[t] + carry[n];
          d.C[row + n] += states[t * s.states + n] * inner[t];
          d.B[row + n] += adjoint * dts[t] * s.u[at];
          ddt_u += adjoint * s.B[row + n];
          ddt += adjoint * before * decay * a;
          d.A[e * s.states + n] += adjoint * before * decay * dts[t];
          carry[n] = adjoint * decay;
        }
        d.u[at] = ddt_u * dts[t] + (s.D ? inner[t] * s.D[e] : 0);
        if (d.D) d.D[e] += inner[t] * s.u[at];
        d.delta[at] = (ddt + ddt_u * s.u[at]) * (s.softplus && raws[t] <= 20 ? sigmoid(raws[t]) : 1);
        if (d.delta_bias) d.delta_bias[e] += d.delta[at];
      }
    }
  }
}

struct Conv {
  const double *x, *weight, *bias;
  int64_t batch, tokens, channels, taps;
  bool silu;

  template <class Inputs>  // ConvInputs
  explicit Conv(const Inputs& i)
      : x(const_ptr<double>(i.x)), weight(const_ptr<double>(i.weight)), bias(const_ptr<double>(i.bias)),
        batch(i.conv.batch), tokens(i.conv.tokens), channels(i.conv.channels), taps(i.conv.taps), silu(i.conv.silu) {}
};

// The convolution at one output, before SiLU.
inline double conv_at(const Conv& c, int64_t b, int64_t t, int64_t e) {
  double y = c.bias ? c.bias[e] : 0;
  for (int64_t k = 0; k < c.taps; k++) {
    const int64_t from = t - (c.taps - 1) + k;
    if (from >= 0) y += c.weight[e * c.taps + k] * c.x[(b * c.tokens + from) * c.channels + e];
  }
  return y;
}

template <class Use>
void each(const Conv& c, const Use& use) {
  for (int64_t b = 0; b < c.batch; b++) {
    for (int64_t t = 0; t < c.tokens; t++) {
      for (int64_t e = 0; e < c.channels; e++) use(b, t, e, (b * c.tokens + t) * c.channels + e);
    }
  }
}

inline void conv(const Conv& c, double* out) {
  each(c, [&](int64_t b, int64_t t, int64_t e, int64_t at) {
    const double y = conv_at(c, b, t, e);
    out[at] = c.silu ? y * sigmoid(y) : y;
  });
}

// x, weight and bias begin as zeros; bias may be null.
inline void conv_backward(const Conv& c, const double* grad, double* x, double* weight, double* bias) {
  each(c, [&](int64_t b, int64_t t, int64_t e, int64_t at) {
    const double y = conv_at(c, b, t, e), gate = sigmoid(y);
    const double g = grad[at] * (c.silu ? gate * (1 + y * (1 - gate)) : 1);
    for (int64_t k = 0; k < c.taps; k++) {
      const int64_t from = t - (c.taps - 1) + k;
      if (from < 0) continue;
      const int64_t source = (b * c.tokens + from) * c.channels + e;
      x[source] += g * c.weight[e * c.taps + k];
      weight[e * c.taps + k] += g * c.x[source];
    }
    if (bias) bias[e] += g;
  });
}

}  // namespace ptq4vm::float64
