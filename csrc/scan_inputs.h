// What the scans and their gradients read.
#pragma once

#include "glue.h"

namespace ptq4vm {
namespace {

// What kernels read where it lies: the last axis is contiguous.
inline Tensor as_rows(const char* argument, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  const Tensor typed = as_kernel_type(argument, x);
  const bool rows = typed.size(last) <= 1 || typed.stride(last) == 1;
  return rows && is_aligned(typed) ? typed : as_contiguous(typed);
}

inline Optional as_rows(const char* argument, const Optional& x) {
  return x ? Optional(as_rows(argument, *x)) : std::nullopt;
}

// The last three axes.
inline Rows rows(const Tensor& x) {
  return {x.const_data_ptr(), float_type(x), x.stride(x.dim() - 3), x.stride(x.dim() - 2)};
}

inline Rows rows(const Optional& x) { return x ? rows(*x) : Rows{}; }

struct ScanInputs {
  Tensor u, delta, A, B, C;
  Optional D, z, delta_bias;
  int64_t batch, tokens, channels, states;
  ScalarType type;
  bool softplus;

  ScanInputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
             const Optional& D_, const Optional& z_, const Optional& bias_, bool softplus_)
      : u(u_), delta(delta_), A(A_), B(B_), C(C_), D(D_), z(z_), delta_bias(bias_), softplus(softplus_) {
    check_axes("u", u, 3, "(B, L, E)"), check_axes("A", A, 2, "(E, S)");
    batch = u.size(0), tokens = u.size(1), channels = u.size(2), states = A.size(1);
    type = u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_shape("delta", delta, {batch, tokens, channels});
    check_shape("A", A, {channels, states});
    check_shape("B", B, {batch, tokens, states});
    check_shape("C", C, {batch, tokens, states});
    check_shape("D", D, {channels});
    check_shape("z", z, {batch, tokens, channels});
    check_shape("delta_bias", delta_bias, {channels});
    A = floats("A", A, type), D = floats("D", D, type), delta_bias = floats("delta_bias", delta_bias, type);
    if (type == ScalarType::Double) {
      u = floats("u", u, type), delta = floats("delta", delta, type), z = floats("z", z, type);
      B = floats("B", B, type), C = floats("C", C, type);
    } else {
      u = as_rows("u", u), delta = as_rows("delta", delta), z = as_rows("z", z);
      B = as_rows("B", B), C = as_rows("C", C);
    }
  }

  Scan view(void* y, Float y_type) const {
    return {rows(u), rows(delta), rows(B), rows(C), rows(z),  in<float>(A), in<float>(D), in<float>(delta_bias),
            y,       y_type,      batch,   tokens,  channels, states,       softplus};
  }
};

}  // namespace
}  // namespace ptq4vm
