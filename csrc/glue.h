// What every operator's glue needs: checks, types and layouts, memory for results. The glue is compiled into a library
// of each device: PTQ4VM_KEY says whose implementations it registers, and PTQ4VM_CUDA that they are csrc/cuda's.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "operators.h"
#include "schemas.h"

namespace ptq4vm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Unlike STD_TORCH_CHECK, says nothing of files and lines of ours.
#define PTQ4VM_CHECK(condition, ...) \
  if (__builtin_expect(!(condition), 0)) ::ptq4vm::fail(__VA_ARGS__)

#ifdef PTQ4VM_CUDA
constexpr bool ON_GPU = true;
#else
constexpr bool ON_GPU = false;
#endif

constexpr int64_t LANES = 16;  // output channels of a packed weight's tile

inline int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline int64_t groups(int64_t channels) { return divided_up(channels, LANES); }

inline const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "of another dtype";
  }
}

template <class Numbers>
std::string shape_text(const Numbers& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

inline bool is_integer(ScalarType type) {
  return type == ScalarType::Int || type == ScalarType::Long || type == ScalarType::Char || type == ScalarType::Short ||
         type == ScalarType::Byte;
}

// A view of bytes may begin anywhere.
inline bool is_aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % x.element_size() == 0;
}

// Calls of torch take longer than small kernels, so those that would do nothing are left out.
inline Tensor as_contiguous(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::contiguous(x);
  return is_aligned(x) ? x : torch::stable::clone(x);
}

inline Tensor as(const Tensor& x, ScalarType type) {
  return as_contiguous(x.scalar_type() == type ? x : torch::stable::to(x, type));
}

inline Optional as(const Optional& x, ScalarType type) { return x ? Optional(as(*x, type)) : std::nullopt; }

inline void check_floats(const char* argument, const Tensor& x) {
  PTQ4VM_CHECK(is_float(x.scalar_type()), argument, " must be float32, bfloat16, float16 or float64, it is ",
               name(x.scalar_type()));
}

// Floating-point numbers, contiguous and of the type that kernels read.
inline Tensor floats(const char* argument, const Tensor& x, ScalarType type = ScalarType::Float) {
  check_floats(argument, x);
  return as(x, type);
}

inline Optional floats(const char* argument, const Optional& x, ScalarType type = ScalarType::Float) {
  return x ? Optional(floats(argument, *x, type)) : std::nullopt;
}

inline Tensor make(const Tensor& like, Sizes sizes, ScalarType type) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

inline Tensor zeros(const Tensor& like, Sizes sizes, ScalarType type) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_zeros(like, {shape.data(), shape.size()}, type);
}

// Their sizes have been multiplied already where they are those of one tensor; else they may not fit.
inline int64_t product(const char* what, int64_t a, int64_t b) {
  int64_t result;
  PTQ4VM_CHECK(!__builtin_mul_overflow(a, b, &result), what, ": ", a, " times ", b, " does not fit 64 bits");
  return result;
}

template <class T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* in(const Optional& x) {
  return x ? in<T>(*x) : nullptr;
}

template <class T>
T* out(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
T* out(Optional& x) {
  return x ? out<T>(*x) : nullptr;
}

// Integers as int32. None is cut: on a CPU larger ones are found, and a GPU takes no int64, since that would stop it.
inline Tensor integers(const char* argument, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  PTQ4VM_CHECK(is_integer(type), argument, " must be int32 (or another type of integers), it is ", name(type));
  if (type == ScalarType::Long) {
    PTQ4VM_CHECK(!ON_GPU, argument, " is int64, which would have to be looked at: pass it as int32 on a GPU");
    const Tensor values = as_contiguous(x);
    const int64_t *read = in<int64_t>(values), *end = read + values.numel();
    const auto large = std::find_if(read, end, [](int64_t v) { return v != static_cast<int32_t>(v); });
    PTQ4VM_CHECK(large == end, argument, " has the value ", *large, ", which does not fit int32");
  }
  return as(x, ScalarType::Int);
}

// Zero points as int32. Those of a GPU are not looked at.
inline Tensor zero_points(const char* argument, const Tensor& x) {
  const Tensor values = integers(argument, x);
  if (ON_GPU) return values;
  const int32_t *read = in<int32_t>(values), *end = read + values.numel();
  const auto wrong = std::find_if(read, end, [](int32_t z) { return z != static_cast<int8_t>(z); });
  PTQ4VM_CHECK(wrong == end, argument, ": zero points are int8 codes, one is ", *wrong);
  return values;
}

// Sums of the codes in rows of a weight of so many channels, as int32: within what they can be, no product overflows.
inline Tensor weight_sums(const char* argument, const Tensor& x, int64_t channels) {
  const Tensor values = integers(argument, x);
  if (ON_GPU) return values;
  const int64_t most = 128 * channels;
  const int32_t *read = in<int32_t>(values), *end = read + values.numel();
  const auto wrong = std::find_if(read, end, [=](int32_t sum) { return sum < -most || sum > most; });
  PTQ4VM_CHECK(wrong == end, argument, " has the value ", *wrong, ", but the sum of ", channels, " codes is between ",
               -most, " and ", most);
  return values;
}

template <class Have, class Want>
bool same_sizes(const Have& have, const Want& want) {
  return have.size() == want.size() && std::equal(want.begin(), want.end(), have.begin());
}

template <class Want>
void check_sizes(const char* argument, const Tensor& x, const Want& want) {
  const auto have = x.sizes();
  PTQ4VM_CHECK(same_sizes(have, want), argument,
               " has another shape than the other arguments ask for: ", shape_text(have), ", not ", shape_text(want));
}

inline void check_shape(const char* argument, const Tensor& x, Sizes want) { check_sizes(argument, x, want); }

inline void check_shape(const char* argument, const Optional& x, Sizes want) {
  if (x) check_shape(argument, *x, want);
}

inline void check_axes(const char* argument, const Tensor& x, int64_t axes, const char* which) {
  PTQ4VM_CHECK(x.dim() == axes, argument, " must be ", which, ", its shape is ", shape_text(x.sizes()));
}

inline void check_channels(const char* argument, const Tensor& x) {
  PTQ4VM_CHECK(x.dim() >= 1, argument, " needs a channel axis, its shape is ()");
}

inline Tensor typed(const Tensor& value, const Tensor& original) {
  return value.scalar_type() == original.scalar_type() ? value : torch::stable::to(value, original.scalar_type());
}

// Qparams of x (…, L, D): per tensor (1,), per token (L,), or per image and token (…, L). With `stacked`, x and its
// qparams have an axis of directions before these. The number of qparams (of a direction).
inline int64_t qparams(const Tensor& x, const Tensor& scale, bool stacked = false) {
  const int64_t axes = x.dim() - stacked, own = scale.dim() - stacked;
  const int64_t tokens = axes > 1 ? x.size(x.dim() - 2) : 1;
  PTQ4VM_CHECK(!stacked || (own >= 0 && scale.size(0) == x.size(0)), "qparams of stacked inputs need an axis of ",
               x.size(0), " directions");
  if (own == 1) {
    const int64_t have = scale.size(stacked);
    PTQ4VM_CHECK(have == 1 || have == tokens, "token scales were calibrated for ", have, " tokens, the input has ",
                 tokens, "; calibrate at this resolution or use Granularity.PER_TENSOR");
  } else {
    bool same = own == axes - 1;
    for (int64_t i = 0; same && i < scale.dim(); i++) same = scale.size(i) == x.size(i);
    PTQ4VM_CHECK(same, "scales of shape ", shape_text(scale.sizes()), " do not fit an input of shape ",
                 shape_text(x.sizes()), ": they need its shape without the last axis");
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

inline Tensor as_kernel_type(const char* argument, const Tensor& x) {
  check_floats(argument, x);
  return has_kernels(x.scalar_type()) ? x : torch::stable::to(x, ScalarType::Float);
}

// What kernels read: contiguous, or with `any_rows` with contiguous channels.
struct Input {
  Tensor values;
  Float type;

  Input(const Tensor& x, bool any_rows = false) : values(as_kernel_type("x", x)), type(float_type(values)) {
    const int64_t axis = x.dim() - 1;
    const bool rows = any_rows && axis >= 0 && (values.stride(axis) == 1 || values.size(axis) == 1);
    if (!rows || !is_aligned(values)) values = as_contiguous(values);
  }

  const void* data() const { return values.const_data_ptr(); }
};

// The orders (K, T) of `tokens` tokens as int32: no direction names one twice, and those of a permutation name all. On
// a GPU they are not looked at, since that would stop it.
inline Tensor orders(const Tensor& order, int64_t tokens, bool permutation) {
  const Tensor values = integers("order", order);
  if (ON_GPU) return values;
  const int64_t steps = order.size(1), least = permutation ? 0 : -1;
  constexpr int64_t MOST = int64_t{1} << 24;
  PTQ4VM_CHECK(!values.numel() || tokens <= MOST, "an order is of at most ", MOST, " tokens, not ", tokens);
  std::vector<char> seen(values.numel() ? tokens : 0);
  const int32_t *read = in<int32_t>(values), *end = read + values.numel();
  for (const int32_t* direction = read; direction < end; direction += steps) {
    std::fill(seen.begin(), seen.end(), 0);
    for (const int32_t* token = direction; token < direction + steps; token++) {
      PTQ4VM_CHECK(least <= *token && *token < tokens, "the order of ", tokens, " tokens names token ", *token,
                   ", which is not between ", least, " and ", tokens - 1);
      if (*token < 0) continue;
      PTQ4VM_CHECK(!seen[*token], "the order of direction ", (direction - read) / steps, " names token ", *token,
                   " twice");
      seen[*token] = 1;
    }
  }
  return values;
}

inline void check_bits(int64_t bits) {
  PTQ4VM_CHECK(2 <= bits && bits <= 8, "bits must be between 2 and 8, got ", bits);
}

inline int lowest(int64_t bits) { return -(1 << (bits - 1)); }

inline void check_codes(const char* argument, const Tensor& x, int64_t axes) {
  PTQ4VM_CHECK(x.scalar_type() == ScalarType::Char && x.dim() >= axes, argument, " must be int8 codes of at least ",
               axes, " axes, it is ", name(x.scalar_type()), " of shape ", shape_text(x.sizes()));
}

inline void check_zero_points(const char* argument, const Tensor& zero, const Tensor& scale) {
  PTQ4VM_CHECK(zero.numel() == scale.numel(), argument, ": there are ", scale.numel(), " scales and ", zero.numel(),
               " zero points");
  check_sizes(argument, zero, scale.sizes());
}

// The qparams of codes, kept in the types that kernels read.
struct Codes {
  Tensor inv_scale, zero_point;
  Optional inv_smooth;
  int64_t scales;
  int low;

  Codes(const Tensor& inv, const Tensor& zero, const Optional& smooth, int64_t bits, int64_t scales_of_set)
      : inv_scale((check_bits(bits), check_zero_points("zero_point", zero, inv), floats("inv_scale", inv))),
        zero_point(zero_points("zero_point", zero)), inv_smooth(floats("inv_smooth", smooth)), scales(scales_of_set),
        low(lowest(bits)) {}

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
  check_axes("x", x, 3, "(B, L, E)"), check_axes("weight", weight, 2, "(E, K)");
  PTQ4VM_CHECK(weight.size(1) >= 1, "a convolution needs at least one tap");
  check_shape("weight", weight, {x.size(2), weight.size(1)});
  check_shape("bias", bias, {x.size(2)});
}

inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

// The argument at a place of an operator's schema.
inline std::string argument_of(std::string_view operator_name, int place) {
  for (std::string_view schema : SCHEMAS) {
    const size_t open = schema.find('(');
    if (schema.substr(0, open) != operator_name) continue;
    std::string_view rest = schema.substr(open + 1, schema.find(')') - open - 1);
    for (; place > 0; place--) rest.remove_prefix(rest.find(", ") + 2);
    rest = rest.substr(0, rest.find(", "));
    return std::string(rest.substr(rest.rfind(' ') + 1));
  }
  return "an argument";
}

// Whether gradients of a result would be asked for; for which the stable ABI has no call. What is made of a leaf that
// requires gradients is none.
inline bool requires_gradient(const Tensor& x) {
  if (!is_float(x.scalar_type())) return false;
  std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return !torch::stable::detail::to<bool>(stack[0]);
}

// Checked<&f, Name>::call is f for an operator, after what is asked of all tensors of all operators: one device, memory
// that lies in strides, and no gradients. An operator that has gradients comes here without them. What is said of bad
// arguments begins with the operator's name.
template <auto F, class Name>
struct Checked;

template <class Result, class... Arguments, Result (*F)(Arguments...), class Name>
struct Checked<F, Name> {
  static Result call(Arguments... arguments) {
    try {
      State state{aoti_torch_grad_mode_is_enabled()};
      (check(state, arguments), ...);
      return F(arguments...);
    } catch (const std::exception& error) {
      const std::string prefix = std::string("ptq4vm::") + Name::text();
      std::string message = error.what();
      message = message.substr(0, message.find(" (originally from"));  // what follows is a file of torch's
      if (message.compare(0, prefix.size(), prefix) == 0) throw;
      throw std::runtime_error(prefix + ": " + message);
    }
  }

 private:
  struct State {
    bool gradients;
    int place = -1;
    std::optional<torch::stable::Device> first = std::nullopt;
  };

  static void check(State& state, const Tensor& x) {
    state.place++;
    PTQ4VM_CHECK(x.defined(), argument(state), " is None, it must be a tensor");
    const auto device = x.device();
    if (!state.first) state.first = device;
    PTQ4VM_CHECK(device == *state.first, "all tensors must be on one device: the first is on ", name(*state.first),
                 ", another on ", name(device), ", ", argument(state),
                 "; move the model and its inputs with .to(device)");
    PTQ4VM_CHECK(x.layout() == torch::headeronly::Layout::Strided, argument(state), " is sparse: call .to_dense()");
    PTQ4VM_CHECK(!state.gradients || !requires_gradient(x), "the operator has no gradient, and ", argument(state),
                 " requires one: call it under torch.no_grad(), or take gradients of the prepared model");
  }

  static void check(State& state, const Optional& x) { x ? check(state, *x) : void(state.place++); }

  template <class T>
  static void check(State& state, const T&) {
    state.place++;
  }

  static std::string argument(const State& state) { return argument_of(Name::text(), state.place); }

  static std::string name(const torch::stable::Device& device) {
    if (device.is_cpu()) return "the CPU";
    if (device.is_cuda()) return "GPU " + std::to_string(device.index());
    return "another device";
  }
};

}  // namespace
}  // namespace ptq4vm

#define PTQ4VM_IMPL(m, name)                    \
  struct Name_##name {                          \
    static const char* text() { return #name; } \
  };                                            \
  (m).impl(#name, TORCH_BOX((&::ptq4vm::Checked<&::ptq4vm::name, Name_##name>::call)))
