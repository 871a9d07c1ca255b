// The gradients of the scan, which only the CPU has.
#include "run.h"
#include "scan_inputs.h"

namespace ptq4vm {
namespace {

// (parts, …) → (…), in one order whatever the number of threads.
Tensor sum_first(const Tensor& x, Shape sizes) {
  Tensor total = zeros_like(x, sizes, ScalarType::Float);
  const int64_t parts = x.size(0), count = total.numel();
  const float* from = const_ptr<float>(x);
  float* to = mutable_ptr<float>(total);
  parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < parts; part++) {
      for (int64_t i = begin; i < end; i++) to[i] += from[part * count + i];
    }
  });
  return total;
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

EightTensors selective_scan_backward(Tensor grad, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D,
                                     Optional z, Optional bias, bool softplus) {
  const ScanInputs s(u, delta, A, B, C, D, z, bias, softplus);
  check_shape("grad", grad, u.sizes());
  grad = floats("grad", grad, s.type);
  // Loops over what is empty in one axis could be long in the others.
  const bool empty = !grad.numel(), in_parts = !empty && s.type == ScalarType::Float;
  const int64_t batch = s.scan.batch, tokens = s.scan.tokens, channels = s.scan.channels, states = s.scan.states;
  const int64_t panels = divided_up(channels, PANEL);
  const auto fresh = [&](Shape sizes) {
    return in_parts ? empty_like(s.u, sizes, s.type) : zeros_like(s.u, sizes, s.type);
  };
  const auto of_states = [&] {
    return in_parts ? fresh({panels, batch, tokens, states}) : fresh({batch, tokens, states});
  };
  const auto of_channels = [&](const Optional& x) {
    if (!x) return Optional();
    return Optional(in_parts ? fresh({batch, channels}) : fresh({channels}));
  };
  Tensor du = fresh(u.sizes()), ddelta = fresh(u.sizes()), dB = of_states(), dC = of_states();
  Tensor dA = in_parts ? fresh({batch, channels, states}) : fresh({channels, states});
  Optional dD = of_channels(D), dbias = of_channels(bias), dz;
  if (z) dz = fresh(u.sizes());
  if (in_parts) {
    run(u, ScanBackward{.forward = s.scan,
                        .grad = const_ptr<float>(grad),
                        .u = mutable_ptr<float>(du),
                        .delta = mutable_ptr<float>(ddelta),
                        .A = mutable_ptr<float>(dA),
                        .B = mutable_ptr<float>(dB),
                        .C = mutable_ptr<float>(dC),
                        .D = mutable_ptr<float>(dD),
                        .z = mutable_ptr<float>(dz),
                        .delta_bias = mutable_ptr<float>(dbias)});
    dA = sum_first(dA, {channels, states});
    dB = sum_first(dB, {batch, tokens, states}), dC = sum_first(dC, {batch, tokens, states});
    if (dD) dD = sum_first(*dD, {channels});
    if (dbias) dbias = sum_first(*dbias, {channels});
  } else if (!empty) {
    float64::scan_backward(float64::Scan(s), const_ptr<double>(grad),
                           {.u = mutable_ptr<double>(du),
                            .delta = mutable_ptr<double>(ddelta),
                            .A = mutable_ptr<double>(dA),
                            .B = mutable_ptr<double>(dB),
                            .C = mutable_ptr<double>(dC),
                            .D = mutable_ptr<double>(dD),
                            .z = mutable_ptr<double>(dz),
                            .delta_bias = mutable_ptr<double>(dbias)});
  }
  const auto optional = [&](const Optional& value, const Optional& original) {
    return value ? cast_like(*value, *original) : empty_like(s.u, {0}, s.type);
  };
  return {cast_like(du, u), cast_like(ddelta, delta), cast_like(dA, A), cast_like(dB, B),
          cast_like(dC, C), optional(dD, D),          optional(dz, z),  optional(dbias, bias)};
}

}  // namespace
}  // namespace ptq4vm

PTQ4VM_IMPL(selective_scan_backward,
            "(Tensor grad, " PTQ4VM_SCAN ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
