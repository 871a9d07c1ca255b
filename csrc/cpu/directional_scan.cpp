// ops.directional_scan and directional_scan_quantize in float32: outputs differ from those in float64 by about 1e-6
// of the largest. Sums over directions have one order, whatever the division of work.
#include "dt_projection.h"
#include "scan_states.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

// The scans of some images' panels, with the memory they need.
class DirectionalScanner {
 public:
  explicit DirectionalScanner(const DirectionalScan& scan)
      : s(scan), vectors(vectors_of(s.panel)), coefficients(s.states), states(vectors, s.states),
        projection(s, s.panel), sums(s.tokens * vectors) {}

  void run(int64_t image, int64_t panel) {
    const int64_t first = panel * s.panel, last = std::min(first + s.panel, s.channels);
    std::fill(sums.begin(), sums.end(), f32xw{});
    for (int64_t k = 0; k < s.directions; k++) {
      states.begin(s.A + k * s.channels * s.states, first, last, s.channels);
      projection.begin(k, first, last);
      for (int64_t t = 0; t < s.length; t += CHUNK) chunk(k, image, t, first, last);
      if (!s.merge) {
        finish(k * s.batch + image, image, first, last);
        std::fill(sums.begin(), sums.end(), f32xw{});
      }
    }
    if (s.merge) finish(image, image, first, last);
  }

 private:
  void chunk(int64_t k, int64_t image, int64_t begin, int64_t first, int64_t last) {
    const int32_t* tokens = s.order + k * s.length + begin;
    ScanChunk c;
    c.tokens = std::min(CHUNK, s.length - begin);
    for (int64_t t = 0; t < c.tokens; t++) {
      const int64_t S = s.states, row = (k * s.batch + image) * s.tokens + tokens[t];
      const float* x = tokens[t] < 0 ? nullptr : s.projected + row * (s.rank + 2 * S);
      projection.quantize(t, x, tokens[t]);
      coefficients.set(t, S, x ? x + s.rank : nullptr);
    }
    for (int64_t e = first, at = 0; e < last; e += STRIP * WIDTH, at += STRIP) {
      const int64_t count = std::min(STRIP * WIDTH, last - e), row = k * s.channels + e;
      c.vectors = vectors_of(count);
      for (int64_t t = 0; t < c.tokens; t++) {
        if (tokens[t] < 0) {
          for (int64_t v = 0; v < c.vectors; v++) c.dt_u[v][t] = f32xw{};
        } else {
          each_vector(s.u, image, tokens[t], k * s.u_direction + e, count,
                      [&](int64_t v, f32xw u) { c.dt_u[v][t] = u; });
        }
      }
      for (int64_t v = 0; v < c.vectors; v++) {
        const int64_t left = count - v * WIDTH;
        const f32xw skip = s.D ? load_lanes(s.D + row + v * WIDTH, left) : f32xw{};
        projection.multiply(c.dt[v], at + v, e + v * WIDTH);
        const f32xw longest =
            prepare_chunk(c, v, load_lanes(s.dt_bias + row + v * WIDTH, left), s.D ? &skip : nullptr, true);
        states.recur(c, v, longest, coefficients, at + v);
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
        const RowQParams qparams(s.qparams, token);
        const float* smooth = s.qparams.inv_smooth ? s.qparams.inv_smooth + first : nullptr;
        for (int64_t v = 0; v < vectors_of(last - first); v++) {
          const int64_t left = last - first - v * WIDTH;
          const f32xw value = smooth ? y[v] * load_lanes(smooth + v * WIDTH, left) : y[v];
          store_codes(s.codes + at + v * WIDTH, value, qparams, left);
        }
      } else {
        write_vectors(s.y, s.y_type, at, last - first, [&](int64_t v) { return y[v]; });
      }
    }
  }

  const DirectionalScan& s;
  const int64_t vectors;
  ScanCoefficients coefficients;
  PanelStates states;
  DtProjection projection;
  std::vector<f32xw> sums;  // (tokens, vectors)
};

}  // namespace

void run(const DirectionalScan& s, int64_t begin, int64_t end) {
  const int64_t panels = divided_up(s.channels, s.panel);
  DirectionalScanner directions(s);
  for (int64_t item = begin; item < end; item++) directions.run(item / panels, item % panels);
}

}  // namespace ptq4vm::PTQ4VM_SET
