// The inputs of the selective scan and its gradients: read where they lie, if their channels are contiguous.
#pragma once

#include "../cpu/float64.h"
#include "qparams.h"

#define PTQ4VM_SCAN                                                                                  \
  "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, " \
  "bool delta_softplus"

namespace ptq4vm {

struct ScanInputs {
  Tensor u, delta, A, B, C;
  Optional D, z, delta_bias;
  ScalarType type;
  Scan scan = {};  // without y; of float64 only sizes

  ScanInputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
             const Optional& D_, const Optional& z_, const Optional& bias_, bool softplus)
      : u(u_), delta(delta_), A(A_), B(B_), C(C_), D(D_), z(z_), delta_bias(bias_) {
    check_axes("u", u, 3, "(B, L, E)"), check_axes("A", A, 2, "(E, S)");
    const int64_t batch = u.size(0), tokens = u.size(1), channels = u.size(2), states = A.size(1);
    scan.batch = batch, scan.tokens = tokens, scan.channels = channels, scan.states = states;
    type = u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_shape("delta", delta, u.sizes());
    check_shape("A", A, {channels, states});
    check_shape("B", B, {batch, tokens, states});
    check_shape("C", C, {batch, tokens, states});
    check_shape("D", D, {channels});
    check_shape("z", z, u.sizes());
    check_shape("delta_bias", delta_bias, {channels});
    check_float64(type);
    const auto read = [&](const char* argument, const auto& x) {
      return type == ScalarType::Double ? floats(argument, x, type) : as_rows(argument, x);
    };
    A = floats("A", A, type), D = floats("D", D, type), delta_bias = floats("delta_bias", delta_bias, type);
    u = read("u", u), delta = read("delta", delta), z = read("z", z), B = read("B", B), C = read("C", C);
    scan.softplus = softplus;
    if (type == ScalarType::Double) return;
    scan.u = rows(u), scan.delta = rows(delta), scan.z = rows(z), scan.B = rows(B), scan.C = rows(C);
    scan.A = const_ptr<float>(A), scan.D = const_ptr<float>(D), scan.delta_bias = const_ptr<float>(delta_bias);
  }
};

}  // namespace ptq4vm
