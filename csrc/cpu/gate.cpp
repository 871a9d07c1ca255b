// ops.gate_quantize: bit for bit without SiLU, since this file is compiled without contraction and terms are added in
// their order; with it codes may differ from the reference's by one at rounding ties.
#include "quantize.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

template <bool SILU, class T, class G>
void code_rows(const GateQuantize& q, const T* x, const G* gate, int64_t begin, int64_t end) {
  const float* inv_smooth = q.qparams.inv_smooth;
  for (int64_t r = begin; r < end; r++) {
    const int64_t image = r / q.tokens, token = r % q.tokens;
    const T* values = x + image * q.x.image + token * q.x.row;
    const G* gates = gate + image * q.gate.image + token * q.gate.row;
    const RowQParams qparams(q.qparams, r);
    int8_t* codes = q.codes + r * q.channels;
    for (int64_t d = 0; d < q.channels; d += WIDTH) {
      const int64_t count = q.channels - d;
      f32xw total{};
      for (int64_t k = 0; k < q.terms; k++) {
        const f32xw g = load_lanes(gates + k * q.gate_term + d, count);
        total += load_lanes(values + k * q.x_term + d, count) * (SILU ? silu(g) : g);
      }
      if (inv_smooth) total *= load_lanes(inv_smooth + d, count);
      store_codes(codes + d, total, qparams, count);
    }
  }
}

}  // namespace

void run(const GateQuantize& q, int64_t begin, int64_t end) {
  with_type(q.x.type, [&](auto x_type) {
    with_type(q.gate.type, [&](auto gate_type) {
      using T = decltype(x_type);
      using G = decltype(gate_type);
      const auto rows = q.silu ? code_rows<true, T, G> : code_rows<false, T, G>;
      rows(q, static_cast<const T*>(q.x.data), static_cast<const G*>(q.gate.data), begin, end);
    });
  });
}

}  // namespace ptq4vm::PTQ4VM_SET
