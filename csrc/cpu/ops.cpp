// The operators on a CPU: checks, types and layouts, memory for the results, and the kernels in parallel.
// A float64 scan or convolution runs in plain loops; every other floating type is computed in float32.
#include "float64.h"
#include "glue.h"

namespace ptq4vm {
namespace {

Tensor quantize(Tensor x, Tensor inv_scale, Tensor zero_point, Optional inv_smooth, int64_t bits) {
  STD_TORCH_CHECK(2 <= bits && bits <= 8, "bits must be between 2 and 8, got ", bits);
  STD_TORCH_CHECK(x.dim() >= 1, "x needs a channel axis");
  const int64_t scales = qparams(x, inv_scale), channels = x.size(x.dim() - 1);
  STD_TORCH_CHECK(zero_point.numel() == inv_scale.numel(), "there are ", inv_scale.numel(), " scales and ",
                  zero_point.numel(), " zero points");
  check_shape("inv_smooth", inv_smooth, {channels});
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  x = as(x, half ? ScalarType::BFloat16 : ScalarType::Float);
  inv_scale = as(inv_scale, ScalarType::Float);
  zero_point = as(zero_point, ScalarType::Int);
  inv_smooth = as(inv_smooth, ScalarType::Float);
  const auto shape = with_last(x, channels);
  Tensor codes = torch::stable::new_empty(x, {shape.data(), shape.size()}, ScalarType::Char);
  const int64_t rows = channels ? x.numel() / channels : 0;
  const int half_range = 1 << (bits - 1);
  const Quantize q{x.const_data_ptr(),     half ? Float::bf16 : Float::f32, in<float>(inv_scale), in<int32_t>(zero_point),
                   in<float>(inv_smooth),  out<int8_t>(codes),              rows,                 channels,
                   scales,                 -half_range,                     half_range - 1};
  const auto run = kernels().quantize;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, channels)),
                              [&](int64_t begin, int64_t end) { run(q, begin, end); });
  return codes;
}

struct ScanInputs {
  Tensor u, delta, A, B, C;
  Optional D, z, delta_bias;
  int64_t batch, tokens, channels, states;
  ScalarType type;

  ScanInputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
             const Optional& D_, const Optional& z_, const Optional& bias_)
      : u(u_), delta(delta_), A(A_), B(B_), C(C_), D(D_), z(z_), delta_bias(bias_) {
    STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2, "u must be (B, L, E) and A (E, S)");
    batch = u.size(0), tokens = u.size(1), channels = u.size(2), states = A.size(1);
    type = u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_shape("delta", delta, {batch, tokens, channels});
    check_shape("A", A, {channels, states});
    check_shape("B", B, {batch, tokens, states});
    check_shape("C", C, {batch, tokens, states});
    check_shape("D", D, {channels});
    check_shape("z", z, {batch, tokens, channels});
    check_shape("delta_bias", delta_bias, {channels});
    u = as(u, type), delta = as(delta, type), A = as(A, type), B = as(B, type), C = as(C, type);
    D = as(D, type), z = as(z, type), delta_bias = as(delta_bias, type);
  }

  template <class S, class T, class... Rest>
  S view(Rest... rest) const {
    return S{in<T>(u), in<T>(delta), in<T>(A), in<T>(B), in<T>(C), in<T>(D), in<T>(z), in<T>(delta_bias), rest...};
  }
};

Tensor selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z, Optional bias,
                      bool softplus) {
  const ScanInputs s(u, delta, A, B, C, D, z, bias);
  Tensor y = make(s.u, {s.batch, s.tokens, s.channels}, s.type);
  if (s.type == ScalarType::Double) {
    float64::scan(s.view<float64::Scan, double>(s.batch, s.tokens, s.channels, s.states, softplus), out<double>(y));
  } else {
    const auto q = s.view<Scan, float>(out<float>(y), s.batch, s.tokens, s.channels, s.states, softplus);
    const auto run = kernels().scan;
    torch::stable::parallel_for(0, s.batch * groups(s.channels), 1,
                                [&](int64_t begin, int64_t end) { run(q, begin, end); });
  }
  return y.scalar_type() == u.scalar_type() ? y : torch::stable::to(y, u.scalar_type());
}

Tensor sum_images(const Tensor& x) {
  const int64_t axis = 0;
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&axis, 1));
}

Tensor typed(const Tensor& value, const Tensor& original) {
  return value.scalar_type() == original.scalar_type() ? value : torch::stable::to(value, original.scalar_type());
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Eight selective_scan_backward(Tensor grad, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z,
                              Optional bias, bool softplus) {
  const ScanInputs s(u, delta, A, B, C, D, z, bias);
  const ScalarType type = s.type;
  check_shape("grad", grad, {s.batch, s.tokens, s.channels});
  grad = as(grad, type);
  const bool exact = type == ScalarType::Double;
  const auto fresh = [&](Sizes sizes) { return exact ? zeros(s.u, sizes, type) : make(s.u, sizes, type); };
  Tensor du = fresh({s.batch, s.tokens, s.channels}), ddelta = fresh({s.batch, s.tokens, s.channels});
  Tensor dB = fresh({s.batch, s.tokens, s.states}), dC = fresh({s.batch, s.tokens, s.states});
  Tensor dA = exact ? fresh({s.channels, s.states}) : fresh({s.batch, s.channels, s.states});
  const auto shared = [&](const Optional& x) {
    if (!x) return Optional();
    return Optional(exact ? fresh({s.channels}) : fresh({s.batch, s.channels}));
  };
  Optional dD = shared(D), dbias = shared(bias), dz;
  if (z) dz = fresh({s.batch, s.tokens, s.channels});
  if (exact) {
    const float64::Gradients to{out<double>(du), out<double>(ddelta), out<double>(dA), out<double>(dB), out<double>(dC),
                                out<double>(dD), out<double>(dz),     out<double>(dbias)};
    float64::scan_backward(s.view<float64::Scan, double>(s.batch, s.tokens, s.channels, s.states, softplus),
                           in<double>(grad), to);
  } else {
    const ScanBackward q{s.view<Scan, float>(static_cast<float*>(nullptr), s.batch, s.tokens, s.channels, s.states, softplus),
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
    torch::stable::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) { run(q, begin, end); });
    dA = sum_images(dA);
    if (dD) dD = sum_images(*dD);
    if (dbias) dbias = sum_images(*dbias);
  }
  const auto maybe = [&](const Optional& value, const Optional& original) {
    return value ? typed(*value, *original) : make(s.u, {0}, type);
  };
  return {typed(du, u), typed(ddelta, delta), typed(dA, A),  typed(dB, B),
          typed(dC, C), maybe(dD, D),         maybe(dz, z), maybe(dbias, bias)};
}

struct ConvInputs {
  Tensor x, weight;
  Optional bias;
  int64_t batch, tokens, channels, taps;
  ScalarType type;

  ConvInputs(const Tensor& x_, const Tensor& weight_, const Optional& bias_) : x(x_), weight(weight_), bias(bias_) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x must be (B, L, E) and the weight (E, K)");
    batch = x.size(0), tokens = x.size(1), channels = x.size(2), taps = weight.size(1);
    STD_TORCH_CHECK(taps >= 1, "a convolution needs at least one tap");
    check_shape("weight", weight, {channels, taps});
    check_shape("bias", bias, {channels});
    type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    x = as(x, type), weight = as(weight, type), bias = as(bias, type);
  }
};

Tensor causal_conv1d(Tensor x, Tensor weight, Optional bias, bool silu) {
  const ConvInputs c(x, weight, bias);
  Tensor y = make(c.x, {c.batch, c.tokens, c.channels}, c.type);
  if (c.type == ScalarType::Double) {
    float64::conv({in<double>(c.x), in<double>(c.weight), in<double>(c.bias), c.batch, c.tokens, c.channels, c.taps, silu},
                  out<double>(y));
  } else {
    const Conv q{in<float>(c.x), in<float>(c.weight), in<float>(c.bias), out<float>(y), c.batch,
                 c.tokens,       c.channels,          c.taps,            silu};
    const auto run = kernels().conv;
    torch::stable::parallel_for(0, c.batch * groups(c.channels), 1,
                                [&](int64_t begin, int64_t end) { run(q, begin, end); });
  }
  return typed(y, x);
}

std::tuple<Tensor, Tensor, Tensor> causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight, Optional bias, bool silu) {
  const ConvInputs c(x, weight, bias);
  check_shape("grad", grad, {c.batch, c.tokens, c.channels});
  const ScalarType grad_type = grad.scalar_type();
  grad = as(grad, c.type);
  Optional dbias;
  Tensor dx, dweight;
  if (c.type == ScalarType::Double) {
    dx = zeros(c.x, {c.batch, c.tokens, c.channels}, c.type);
    dweight = zeros(c.x, {c.channels, c.taps}, c.type);
    if (bias) dbias = zeros(c.x, {c.channels}, c.type);
    float64::conv_backward(
        {in<double>(c.x), in<double>(c.weight), in<double>(c.bias), c.batch, c.tokens, c.channels, c.taps, silu},
        in<double>(grad), out<double>(dx), out<double>(dweight), out<double>(dbias));
  } else {
    dx = make(c.x, {c.batch, c.tokens, c.channels}, c.type);
    dweight = make(c.x, {c.batch, c.channels, c.taps}, c.type);
    if (bias) dbias = make(c.x, {c.batch, c.channels}, c.type);
    const ConvBackward q{{in<float>(c.x), in<float>(c.weight), in<float>(c.bias), nullptr, c.batch, c.tokens, c.channels,
                          c.taps, silu},
                         in<float>(grad),
                         out<float>(dx),
                         out<float>(dweight),
                         out<float>(dbias)};
    const auto run = kernels().conv_backward;
    torch::stable::parallel_for(0, c.batch * groups(c.channels), 1,
                                [&](int64_t begin, int64_t end) { run(q, begin, end); });
    dweight = sum_images(dweight);
    if (dbias) dbias = sum_images(*dbias);
  }
  return {typed(dx, x), typed(dweight, weight), bias ? typed(*dbias, *bias) : make(c.x, {0}, grad_type)};
}

// Chooses an instruction set for what follows, at most the best one ("" chooses none); gives the one in use.
std::string use_isa_named(std::string wanted) {
  for (int i = 0; i <= static_cast<int>(best_isa()); i++) {
    if (wanted == name(static_cast<Isa>(i))) use_isa(static_cast<Isa>(i));
  }
  return name(isa());
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CPU, m) {
  m.impl("quantize", TORCH_BOX(&ptq4vm::quantize));
  m.impl("selective_scan", TORCH_BOX(&ptq4vm::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&ptq4vm::selective_scan_backward));
  m.impl("causal_conv1d", TORCH_BOX(&ptq4vm::causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&ptq4vm::causal_conv1d_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CompositeExplicitAutograd, m) {
  m.impl("_use_isa", TORCH_BOX(&ptq4vm::use_isa_named));
}
