// What every operator's glue needs: checks, types and layouts, memory for results. The glue is compiled into a library of
// each device: PTQ4VM_KEY says whose implementations it registers, and PTQ4VM_CUDA that they are csrc/cuda's.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "operators.h"

namespace ptq4vm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

#ifdef PTQ4VM_CUDA
constexpr bool ON_GPU = true;
#else
constexpr bool ON_GPU = false;
#endif

constexpr int64_t LANES = 16;  // output channels of a packed weight's tile

inline int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline int64_t groups(int64_t channels) { return divided_up(channels, LANES); }

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

// The types that kernels read and write; every other one is converted to float32.
inline bool has_kernels(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || (ON_GPU && type == ScalarType::Half);
}

inline Float float_type(ScalarType type) {
  if (type == ScalarType::BFloat16) return Float::bf16;
  return ON_GPU && type == ScalarType::Half ? Float::f16 : Float::f32;
}

inline Float float_type(const Tensor& x) { return float_type(x.scalar_type()); }

inline Tensor as_kernel_type(const Tensor& x) {
  return has_kernels(x.scalar_type()) ? x : torch::stable::to(x, ScalarType::Float);
}

// What kernels read: contiguous, or with `any_rows` with contiguous channels.
struct Input {
  Tensor values;
  Float type;

  Input(const Tensor& x, bool any_rows = false) : values(as_kernel_type(x)), type(float_type(values)) {
    const int64_t axis = x.dim() - 1;
    const bool rows = any_rows && axis >= 0 && (values.stride(axis) == 1 || values.size(axis) == 1);
    if (!rows) values = as_contiguous(values);
  }

  const void* data() const { return values.const_data_ptr(); }
};

// Tokens of an order; on a GPU they are not looked at, since that would stop it.
inline void check_order(const Tensor& order, int64_t least, int64_t tokens) {
  if (ON_GPU) return;
  const int32_t *read = in<int32_t>(order), *end = read + order.numel();
  const auto wrong = std::find_if(read, end, [&](int32_t t) { return t < least || t >= tokens; });
  STD_TORCH_CHECK(wrong == end, "the order of ", tokens, " tokens names token ", wrong == end ? 0 : *wrong,
                  ", which is not between ", least, " and ", tokens - 1);
}

inline void check_bits(int64_t bits) {
  STD_TORCH_CHECK(2 <= bits && bits <= 8, "bits must be between 2 and 8, got ", bits);
}

inline int lowest(int64_t bits) { return -(1 << (bits - 1)); }

// The qparams of codes, kept in the types that kernels read.
struct Codes {
  Tensor inv_scale, zero_point;
  Optional inv_smooth;
  int64_t scales;
  int low;

  Codes(const Tensor& inv, const Tensor& zero, const Optional& smooth, int64_t bits, int64_t scales_of_set)
      : inv_scale(as(inv, ScalarType::Float)), zero_point(as(zero, ScalarType::Int)),
        inv_smooth(as(smooth, ScalarType::Float)), scales(scales_of_set), low((check_bits(bits), lowest(bits))) {
    STD_TORCH_CHECK(zero.numel() == inv.numel(), "there are ", inv.numel(), " scales and ", zero.numel(),
                    " zero points");
  }

  Qparams view() const {
    return {in<float>(inv_scale), in<int32_t>(zero_point), in<float>(inv_smooth), scales, low, -low - 1};
  }
};

// The rotation of so many channels, and its matrix.
class RotationOf {
 public:
  explicit RotationOf(int64_t channels) : channels_(channels), order_(std::max<int64_t>(1, channels & -channels)) {
    const int64_t size = channels / order_;
    const double step = 2 * std::acos(-1.0) / static_cast<double>(size), norm = std::sqrt(static_cast<double>(size));
    for (int64_t i = 0; 1 < size && size <= LARGEST_HARTLEY && i < size * size; i++) {
      const double angle = step * static_cast<double>((i / size) * (i % size));
      matrix_.push_back(static_cast<float>((std::cos(angle) + std::sin(angle)) / norm));
    }
  }

  Rotation view() const {
    const float factor = static_cast<float>(1 / std::sqrt(static_cast<double>(order_)));
    return {matrix_.empty() ? nullptr : matrix_.data(), channels_, order_, factor};
  }

 private:
  int64_t channels_, order_;
  std::vector<float> matrix_;
};

inline void check_conv(const Tensor& x, const Tensor& weight, const Optional& bias) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x must be (B, L, E) and the weight (E, K)");
  STD_TORCH_CHECK(weight.size(1) >= 1, "a convolution needs at least one tap");
  check_shape("weight", weight, {x.size(2), weight.size(1)});
  check_shape("bias", bias, {x.size(2)});
}

inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

// Checked<&f>::call is f, where on a GPU all tensors must be on one device.
template <auto F>
struct Checked;

template <class Result, class... Arguments, Result (*F)(Arguments...)>
struct Checked<F> {
  static Result call(Arguments... arguments) {
    if (ON_GPU) {
      std::optional<torch::stable::Device> first;
      (check(first, arguments), ...);
    }
    return F(arguments...);
  }

 private:
  static void check(std::optional<torch::stable::Device>& first, const Tensor& x) {
    const auto device = x.device();
    if (!first) first = device;
    STD_TORCH_CHECK(device == *first, "all tensors must be on one device: the first is on ", name(*first),
                    ", another on ", name(device), "; move the model and its inputs with .to(device)");
  }

  static void check(std::optional<torch::stable::Device>& first, const Optional& x) {
    if (x) check(first, *x);
  }

  template <class T>
  static void check(std::optional<torch::stable::Device>&, const T&) {}

  static std::string name(const torch::stable::Device& device) {
    return device.is_cpu() ? "the CPU" : "GPU " + std::to_string(device.index());
  }
};

}  // namespace
}  // namespace ptq4vm

#define PTQ4VM_IMPL(m, name) (m).impl(#name, TORCH_BOX((&::ptq4vm::Checked<&::ptq4vm::name>::call)))
