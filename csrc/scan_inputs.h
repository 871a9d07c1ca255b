// What the scans and their gradients read.
#pragma once

#include "glue.h"

namespace ptq4vm {
namespace {

// What kernels read where it lies: the last axis is contiguous.
inline Tensor as_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  const Tensor typed = as_kernel_type(x);
  return typed.size(last) <= 1 || typed.stride(last) == 1 ? typed : torch::stable::contiguous(typed);
}

inline Optional as_rows(const Optional& x) { return x ? Optional(as_rows(*x)) : std::nullopt; }

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
    A = as(A, type), D = as(D, type), delta_bias = as(delta_bias, type);
    if (type == ScalarType::Double) {
      u = as(u, type), delta = as(delta, type), B = as(B, type), C = as(C, type), z = as(z, type);
    } else {
      u = as_rows(u), delta = as_rows(delta), B = as_rows(B), C = as_rows(C), z = as_rows(z);
    }
  }

  Scan view(void* y, Float y_type) const {
    return {rows(u),      rows(delta),          rows(B), rows(C), rows(z), in<float>(A),
            in<float>(D), in<float>(delta_bias), y,       y_type,  batch,   tokens,
            channels,     states,               softplus};
  }
};

}  // namespace
}  // namespace ptq4vm
