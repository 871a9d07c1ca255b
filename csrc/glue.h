// What every operator's glue needs: checks, types and layouts, memory for results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace ptq4vm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

constexpr int64_t LANES = 16;

inline int64_t groups(int64_t channels) { return (channels + LANES - 1) / LANES; }

// Calls of torch take longer than small kernels, so those that would do nothing are left out.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor as(const Tensor& x, ScalarType type) {
  return as_contiguous(x.scalar_type() == type ? x : torch::stable::to(x, type));
}

inline Optional as(const Optional& x, ScalarType type) { return x ? Optional(as(*x, type)) : std::nullopt; }

inline Tensor make(const Tensor& like, Sizes sizes, ScalarType type) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

inline Tensor zeros(const Tensor& like, Sizes sizes, ScalarType type) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_zeros(like, {shape.data(), shape.size()}, type);
}

template <class T>
const T* in(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }

template <class T>
const T* in(const Optional& x) { return x ? in<T>(*x) : nullptr; }

template <class T>
T* out(Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

template <class T>
T* out(Optional& x) { return x ? out<T>(*x) : nullptr; }

inline void check_shape(const char* name, const Tensor& x, Sizes want) {
  const auto have = x.sizes();
  bool same = have.size() == want.size() && std::equal(want.begin(), want.end(), have.begin());
  STD_TORCH_CHECK(same, name, " has another shape than the other arguments ask for");
}

inline void check_shape(const char* name, const Optional& x, Sizes want) {
  if (x) check_shape(name, *x, want);
}

inline Tensor sum_images(const Tensor& x) {
  const int64_t axis = 0;
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&axis, 1));
}

inline Tensor typed(const Tensor& value, const Tensor& original) {
  return value.scalar_type() == original.scalar_type() ? value : torch::stable::to(value, original.scalar_type());
}

// Qparams of x (…, L, D): per tensor (1,), per token (L,), or per image and token (…, L). With `stacked`, x and its
// qparams have an axis of directions before these. The number of qparams (of a direction).
inline int64_t qparams(const Tensor& x, const Tensor& scale, bool stacked = false) {
  const int64_t axes = x.dim() - stacked, own = scale.dim() - stacked;
  const int64_t tokens = axes > 1 ? x.size(x.dim() - 2) : 1;
  STD_TORCH_CHECK(!stacked || (own >= 0 && scale.size(0) == x.size(0)), "qparams of stacked inputs need an axis of ",
                  x.size(0), " directions");
  if (own == 1) {
    const int64_t have = scale.size(stacked);
    STD_TORCH_CHECK(have == 1 || have == tokens, "token scales were calibrated for ", have, " tokens, the input has ",
                    tokens, "; calibrate at this resolution or use Granularity.PER_TENSOR");
  } else {
    bool same = own == axes - 1;
    for (int64_t i = 0; same && i < scale.dim(); i++) same = scale.size(i) == x.size(i);
    STD_TORCH_CHECK(same, "scales do not fit the input: they need its shape without the last axis");
  }
  int64_t count = 1;
  for (int64_t i = stacked; i < scale.dim(); i++) count *= scale.size(i);
  return std::max<int64_t>(1, count);
}

// What can be read without conversion: bfloat16, and float32, to which every other type is converted.
struct Input {
  Tensor values;
  Float type;

  Input(const Tensor& x, bool any_rows = false)
      : values(x), type(x.scalar_type() == ScalarType::BFloat16 ? Float::bf16 : Float::f32) {
    const int64_t axis = x.dim() - 1;
    const bool rows = any_rows && axis >= 0 && (x.stride(axis) == 1 || x.size(axis) == 1);
    const ScalarType kind = type == Float::bf16 ? ScalarType::BFloat16 : ScalarType::Float;
    if (!rows || x.scalar_type() != kind) values = as(x, kind);
  }

  const void* data() const { return values.const_data_ptr(); }
};

inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

}  // namespace
}  // namespace ptq4vm
