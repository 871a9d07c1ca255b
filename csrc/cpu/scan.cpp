// ops.selective_scan and selective_scan_quantized in float32: outputs differ from those in float64 by about 1e-6
// of the largest. A chunk of tokens goes through three stages: what needs no state, the recurrence with a block of
// states in registers, and the gate.
#include "scan_states.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

// `quantized` is null, or has the scan.
void scan_groups(const Scan& s, const QuantizedScan* quantized, int64_t begin, int64_t end) {
  const int64_t groups_of_image = groups(s.channels);
  ScanCoefficients coefficients(s.states);
  PanelStates states(std::min(groups_of_image, end - begin) * LANES / WIDTH, s.states, quantized);
  StateQuantization quantization;
  ScanChunk c;
  while (begin < end) {
    const int64_t image = begin / groups_of_image, first = begin % groups_of_image * LANES;
    const int64_t last = std::min(s.channels, first + (end - begin) * LANES);
    begin += groups(last - first);
    states.begin(s.A, first, last, s.channels);
    // All channels take a chunk before any takes the next: memory is read row by row.
    for (int64_t token = 0; token < s.tokens; token += CHUNK) {
      coefficients.read(s, image, token);
      if (quantized) quantization.begin(*quantized, token, coefficients);
      for (int64_t e = first, at = 0; e < last; e += STRIP * WIDTH, at += STRIP) {
        const Window w(s, image, token, e, std::min(e + STRIP * WIDTH, last));
        read_chunk(c, w);
        for (int64_t v = 0; v < c.vectors; v++) {
          const int64_t channel = e + v * WIDTH, left = last - channel;
          const f32xw skip = s.D ? load_lanes(s.D + channel, left) : f32xw{};
          const f32xw bias = s.delta_bias ? load_lanes(s.delta_bias + channel, left) : f32xw{};
          const f32xw longest = prepare_chunk(c, v, bias, s.D ? &skip : nullptr, s.softplus);
          if (quantized) {
            states.recur(c, v, longest, coefficients, at + v, quantization);
          } else {
            states.recur(c, v, longest, coefficients, at + v);
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

void run(const Scan& s, int64_t begin, int64_t end) { scan_groups(s, nullptr, begin, end); }

void run(const QuantizedScan& q, int64_t begin, int64_t end) { scan_groups(q.scan, &q, begin, end); }

}  // namespace ptq4vm::PTQ4VM_SET
