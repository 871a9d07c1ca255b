// What only the CPU has: the scan with quantized states, gradients of the scan and of the convolution, and all in
// float64.
#include "../run.h"
#include "../scan_inputs.h"
#include "float64.h"
#include "kernels.h"

namespace ptq4vm {
namespace {

float64::Scan exact(const ScanInputs& s) {
  return {in<double>(s.u), in<double>(s.delta),      in<double>(s.A), in<double>(s.B), in<double>(s.C), in<double>(s.D),
          in<double>(s.z), in<double>(s.delta_bias), s.batch,         s.tokens,        s.channels,      s.states,
          s.softplus};
}

Tensor selective_scan_quantized(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z,
                                Optional bias, bool softplus, Tensor state_scale, Tensor state_inv_scale,
                                int64_t bits) {
  const ScanInputs s(u, delta, A, B, C, D, z, bias, softplus);
  check_bits(bits);
  const int64_t scales = state_scale.numel();
  check_shape("state_scale", state_scale, {scales});
  PTQ4VM_CHECK(scales == s.tokens || scales == 1, "state scales were calibrated for ", scales,
               " tokens, the input has ", s.tokens, "; calibrate at this resolution");
  check_shape("state_inv_scale", state_inv_scale, {scales});
  state_scale = floats("state_scale", state_scale, s.type);
  state_inv_scale = floats("state_inv_scale", state_inv_scale, s.type);
  const int low = lowest(bits), high = -low - 1;
  Tensor y = make(s.u, {s.batch, s.tokens, s.channels}, s.u.scalar_type());
  if (s.type == ScalarType::Double) {
    float64::Scan q = exact(s);
    q.state_scale = in<double>(state_scale), q.state_inv_scale = in<double>(state_inv_scale);
    q.scales = scales, q.low = low, q.high = high;
    if (y.numel()) float64::scan(q, out<double>(y));
    return y;
  }
  const QuantizedScan q{s.view(y.mutable_data_ptr(), float_type(y)),
                        in<float>(state_scale),
                        in<float>(state_inv_scale),
                        scales,
                        low,
                        high};
  const auto run = kernels().scan_quantized;
  torch::stable::parallel_for(0, s.tokens ? s.batch * groups(s.channels) : 0, 1,
                              [&](int64_t begin, int64_t end) { run(q, begin, end); });
  return typed(y, u);
}

Tensor sum_images(const Tensor& x) {
  const int64_t axis = 0;
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&axis, 1));
}

struct ConvInputs {
  Tensor x, weight;
  Optional bias;
  int64_t batch, tokens, channels, taps;
  ScalarType type;

  ConvInputs(const Tensor& x_, const Tensor& weight_, const Optional& bias_) : x(x_), weight(weight_), bias(bias_) {
    check_conv(x, weight, bias);
    batch = x.size(0), tokens = x.size(1), channels = x.size(2), taps = weight.size(1);
    type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    x = floats("x", x, type), weight = floats("weight", weight, type), bias = floats("bias", bias, type);
  }

  float64::Conv exact(bool silu) const {
    return {in<double>(x), in<double>(weight), in<double>(bias), batch, tokens, channels, taps, silu};
  }
};

// (parts, …) → (…), in one order whatever the number of threads.
Tensor sum_first(const Tensor& x, Sizes sizes) {
  Tensor total = zeros(x, sizes, ScalarType::Float);
  const int64_t parts = x.size(0), count = total.numel();
  const float* from = in<float>(x);
  float* to = out<float>(total);
  torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < parts; part++) {
      for (int64_t i = begin; i < end; i++) to[i] += from[part * count + i];
    }
  });
  return total;
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Eight selective_scan_backward(Tensor grad, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z,
                              Optional bias, bool softplus) {
  const ScanInputs s(u, delta, A, B, C, D, z, bias, softplus);
  const ScalarType type = s.type;
  check_shape("grad", grad, {s.batch, s.tokens, s.channels});
  grad = floats("grad", grad, type);
  // Loops over what is empty in one axis could be long in the others.
  const bool wide = type == ScalarType::Double, empty = !grad.numel();
  const auto fresh = [&](Sizes sizes) { return wide || empty ? zeros(s.u, sizes, type) : make(s.u, sizes, type); };
  Tensor du = fresh({s.batch, s.tokens, s.channels}), ddelta = fresh({s.batch, s.tokens, s.channels});
  const int64_t panels = divided_up(s.channels, PANEL);
  const auto mixing = [&] {
    return wide || empty ? fresh({s.batch, s.tokens, s.states}) : fresh({panels, s.batch, s.tokens, s.states});
  };
  Tensor dB = mixing(), dC = mixing();
  Tensor dA = wide || empty ? fresh({s.channels, s.states}) : fresh({s.batch, s.channels, s.states});
  const auto shared = [&](const Optional& x) {
    if (!x) return Optional();
    return Optional(wide || empty ? fresh({s.channels}) : fresh({s.batch, s.channels}));
  };
  Optional dD = shared(D), dbias = shared(bias), dz;
  if (z) dz = fresh({s.batch, s.tokens, s.channels});
  if (empty) {
    // all gradients are zero
  } else if (wide) {
    const float64::Gradients to{out<double>(du), out<double>(ddelta), out<double>(dA), out<double>(dB),
                                out<double>(dC), out<double>(dD),     out<double>(dz), out<double>(dbias)};
    float64::scan_backward(exact(s), in<double>(grad), to);
  } else {
    const ScanBackward q{s.view(nullptr, Float::f32),
                         in<float>(grad),
                         out<float>(du),
                         out<float>(ddelta),
                         out<float>(dA),
                         out<float>(dB),
                         out<float>(dC),
                         out<float>(dD),
                         out<float>(dz),
                         out<float>(dbias)};
    const auto run = kernels().scan_backward;
    torch::stable::parallel_for(0, s.batch * panels, 1, [&](int64_t begin, int64_t end) { run(q, begin, end); });
    dA = sum_first(dA, {s.channels, s.states});
    dB = sum_first(dB, {s.batch, s.tokens, s.states}), dC = sum_first(dC, {s.batch, s.tokens, s.states});
    if (dD) dD = sum_first(*dD, {s.channels});
    if (dbias) dbias = sum_first(*dbias, {s.channels});
  }
  const auto maybe = [&](const Optional& value, const Optional& original) {
    return value ? typed(*value, *original) : make(s.u, {0}, type);
  };
  return {typed(du, u), typed(ddelta, delta), typed(dA, A), typed(dB, B),
          typed(dC, C), maybe(dD, D),         maybe(dz, z), maybe(dbias, bias)};
}

std::tuple<Tensor, Tensor, Tensor> causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight, Optional bias,
                                                          bool silu) {
  const ConvInputs c(x, weight, bias);
  check_shape("grad", grad, {c.batch, c.tokens, c.channels});
  const ScalarType grad_type = grad.scalar_type();
  grad = floats("grad", grad, c.type);
  const bool empty = !grad.numel();
  Optional dbias;
  Tensor dx, dweight;
  if (empty || c.type == ScalarType::Double) {
    dx = zeros(c.x, {c.batch, c.tokens, c.channels}, c.type);
    dweight = zeros(c.x, {c.channels, c.taps}, c.type);
    if (bias) dbias = zeros(c.x, {c.channels}, c.type);
    if (!empty) {
      float64::conv_backward(c.exact(silu), in<double>(grad), out<double>(dx), out<double>(dweight),
                             out<double>(dbias));
    }
  } else {
    dx = make(c.x, {c.batch, c.tokens, c.channels}, c.type);
    dweight = make(c.x, {c.batch, c.channels, c.taps}, c.type);
    if (bias) dbias = make(c.x, {c.batch, c.channels}, c.type);
    const Conv forward{in<float>(c.x),
                       Float::f32,
                       c.tokens * c.channels,
                       c.channels,
                       in<float>(c.weight),
                       in<float>(c.bias),
                       nullptr,
                       nullptr,
                       nullptr,
                       {},
                       1,
                       c.batch,
                       c.tokens,
                       c.channels,
                       c.taps,
                       silu};
    const ConvBackward q{forward, in<float>(grad), out<float>(dx), out<float>(dweight), out<float>(dbias)};
    const auto run = kernels().conv_backward;
    torch::stable::parallel_for(0, c.batch * groups(c.channels), 1,
                                [&](int64_t begin, int64_t end) { run(q, begin, end); });
    dweight = sum_images(dweight);
    if (dbias) dbias = sum_images(*dbias);
  }
  return {typed(dx, x), typed(dweight, weight), bias ? typed(*dbias, *bias) : make(c.x, {0}, grad_type)};
}

}  // namespace

Tensor causal_conv1d_in_float64(const Tensor& x, const Tensor& weight, const Optional& bias, bool silu) {
  const ConvInputs c(x, weight, bias);
  Tensor y = make(c.x, {c.batch, c.tokens, c.channels}, c.type);
  if (y.numel()) float64::conv(c.exact(silu), out<double>(y));
  return y;
}

Tensor selective_scan_in_float64(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                 const Tensor& C, const Optional& D, const Optional& z, const Optional& bias,
                                 bool softplus) {
  const ScanInputs s(u, delta, A, B, C, D, z, bias, softplus);
  Tensor y = make(s.u, {s.batch, s.tokens, s.channels}, s.type);
  if (y.numel()) float64::scan(exact(s), out<double>(y));
  return y;
}

}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(PTQ4VM_LIBRARY, PTQ4VM_KEY, m) {
  PTQ4VM_IMPL(m, selective_scan_quantized);
  PTQ4VM_IMPL(m, selective_scan_backward);
  PTQ4VM_IMPL(m, causal_conv1d_backward);
}
