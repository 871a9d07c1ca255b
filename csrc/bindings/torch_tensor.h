// The tensors of torch's stable ABI, and what bindings and the CPU's kernels use of torch. onnxruntime/tensor.h has the
// same names for ONNX Runtime.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace ptq4vm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

using torch::stable::clone;
using torch::stable::contiguous;
using torch::stable::get_num_threads;
using torch::stable::new_empty;
using torch::stable::parallel_for;
using torch::stable::to;

// A result at its place among an operator's results, which may be written at once where the caller wants it.
inline Tensor empty_result(int, const Tensor& on, Shape sizes, ScalarType type) { return new_empty(on, sizes, type); }

inline Tensor zeros_like(const Tensor& x, Shape sizes, ScalarType type) {
  return torch::stable::new_zeros(x, sizes, type);
}

}  // namespace ptq4vm
