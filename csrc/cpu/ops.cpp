// The scan on a CPU: checks, types and layouts, memory for the results, and the kernels in parallel.
// A float64 scan runs in plain loops; every other floating type is computed in float32.
#include "float64.h"
#include "glue.h"

namespace ptq4vm {
namespace {

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
  m.impl("selective_scan", TORCH_BOX(&ptq4vm::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&ptq4vm::selective_scan_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CompositeExplicitAutograd, m) {
  m.impl("_use_isa", TORCH_BOX(&ptq4vm::use_isa_named));
}
