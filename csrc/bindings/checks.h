// Checks of an operator's arguments, and their conversion to the types and layouts that kernels read. An error names
// the argument, its value and the way out.
#pragma once

#include "tensors.h"

namespace ptq4vm {

inline void check_floats(const char* argument, const Tensor& x) {
  PTQ4VM_CHECK(is_float(x.scalar_type()), argument, " must be float32, bfloat16, float16 or float64, it is ",
               name(x.scalar_type()));
}

// Floating-point numbers, contiguous and of the type that kernels read.
inline Tensor floats(const char* argument, const Tensor& x, ScalarType type = ScalarType::Float) {
  check_floats(argument, x);
  return to_contiguous(x, type);
}

inline Optional floats(const char* argument, const Optional& x, ScalarType type = ScalarType::Float) {
  return x ? Optional(floats(argument, *x, type)) : std::nullopt;
}

inline void check_float64(ScalarType type) {
  PTQ4VM_CHECK(!ON_GPU || type != ScalarType::Double,
               " has no float64 on a GPU: use float32, or move the tensors to the CPU");
}

// Floating-point numbers of a type that kernels read, with contiguous channels: a part of larger rows stays where it
// is.
inline Tensor as_rows(const char* argument, const Tensor& x) {
  check_floats(argument, x);
  const Tensor values = has_kernels(x.scalar_type()) ? x : to(x, ScalarType::Float);
  const bool rows = channels_of(values) <= 1 || values.stride(values.dim() - 1) == 1;
  return rows && is_aligned(values) ? values : to_contiguous(values);
}

inline Optional as_rows(const char* argument, const Optional& x) {
  return x ? Optional(as_rows(argument, *x)) : std::nullopt;
}

// The last three axes.
inline Rows rows(const Tensor& x) {
  return {x.const_data_ptr(), float_type(x), x.stride(x.dim() - 3), x.stride(x.dim() - 2)};
}

inline Rows rows(const Optional& x) { return x ? rows(*x) : Rows{}; }

// x as a kernel reads it: contiguous, of a type that it has.
struct ContiguousInput {
  Tensor values;
  Float type;

  explicit ContiguousInput(const Tensor& x) : values(to_contiguous(as_rows("x", x))), type(float_type(values)) {}

  const void* data() const { return values.const_data_ptr(); }
};

// A product of sizes, which may not fit where they are not those of one tensor.
inline int64_t product(const char* what, int64_t a, int64_t b) {
  int64_t result;
  PTQ4VM_CHECK(!__builtin_mul_overflow(a, b, &result), what, ": ", a, " times ", b, " does not fit 64 bits");
  return result;
}

// Integers as int32. None is cut: on a CPU larger ones are found, and a GPU takes no int64, since that would stop it.
inline Tensor integers(const char* argument, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  PTQ4VM_CHECK(is_integer(type), argument, " must be int32 (or another type of integers), it is ", name(type));
  if (type == ScalarType::Long) {
    PTQ4VM_CHECK(!ON_GPU, argument, " is int64, which would have to be looked at: pass it as int32 on a GPU");
    const Tensor values = to_contiguous(x);
    const int64_t *read = const_ptr<int64_t>(values), *end = read + values.numel();
    const auto large = std::find_if(read, end, [](int64_t v) { return v != static_cast<int32_t>(v); });
    PTQ4VM_CHECK(large == end, argument, " has the value ", *large, ", which does not fit int32");
  }
  return to_contiguous(x, ScalarType::Int);
}

// The first of some int32 that is wrong, or null. Those of a GPU are not looked at.
template <class Wrong>
const int32_t* find_wrong(const Tensor& values, Wrong wrong) {
  if (ON_GPU) return nullptr;
  const int32_t *read = const_ptr<int32_t>(values), *end = read + values.numel();
  const int32_t* found = std::find_if(read, end, wrong);
  return found == end ? nullptr : found;
}

// Zero points as int32.
inline Tensor zero_points(const char* argument, const Tensor& x) {
  const Tensor values = integers(argument, x);
  const int32_t* wrong = find_wrong(values, [](int32_t z) { return z != static_cast<int8_t>(z); });
  PTQ4VM_CHECK(!wrong, argument, ": zero points are int8 codes, one is ", *wrong);
  return values;
}

// Sums of the codes in rows of a weight of so many channels, as int32: within what they can be, no product overflows.
inline Tensor weight_sums(const char* argument, const Tensor& x, int64_t channels) {
  const Tensor values = integers(argument, x);
  const int64_t most = 128 * channels;
  const int32_t* wrong = find_wrong(values, [=](int32_t sum) { return sum < -most || sum > most; });
  PTQ4VM_CHECK(!wrong, argument, " has the value ", *wrong, ", but the sum of ", channels, " codes is between ", -most,
               " and ", most);
  return values;
}

inline bool same_sizes(Shape have, Shape want) {
  return have.size() == want.size() && std::equal(want.begin(), want.end(), have.begin());
}

inline void check_shape(const char* argument, const Tensor& x, Shape want) {
  PTQ4VM_CHECK(same_sizes(x.sizes(), want), argument,
               " has another shape than the other arguments ask for: ", shape_text(x.sizes()), ", not ",
               shape_text(want));
}

inline void check_shape(const char* argument, const Optional& x, Shape want) {
  if (x) check_shape(argument, *x, want);
}

inline void check_axes(const char* argument, const Tensor& x, int64_t axes, const char* which) {
  PTQ4VM_CHECK(x.dim() == axes, argument, " must be ", which, ", its shape is ", shape_text(x.sizes()));
}

inline void check_channels(const char* argument, const Tensor& x) {
  PTQ4VM_CHECK(x.dim() >= 1, argument, " needs a channel axis, its shape is ()");
}

// The orders (K, T) of `tokens` tokens as int32: no direction names one twice, and those of a permutation name all. On
// a GPU they are not looked at, since that would stop it.
inline Tensor orders(const Tensor& order, int64_t tokens, bool permutation) {
  const Tensor values = integers("order", order);
  if (ON_GPU) return values;
  const int64_t length = order.size(1), least = permutation ? 0 : -1;
  constexpr int64_t MAX_TOKENS = int64_t{1} << 24;
  PTQ4VM_CHECK(!values.numel() || tokens <= MAX_TOKENS, "an order is of at most ", MAX_TOKENS, " tokens, not ", tokens);
  std::vector<char> seen(values.numel() ? tokens : 0);
  const int32_t *read = const_ptr<int32_t>(values), *end = read + values.numel();
  for (const int32_t* direction = read; direction < end; direction += length) {
    std::fill(seen.begin(), seen.end(), 0);
    for (const int32_t* token = direction; token < direction + length; token++) {
      PTQ4VM_CHECK(least <= *token && *token < tokens, "the order of ", tokens, " tokens names token ", *token,
                   ", which is not between ", least, " and ", tokens - 1);
      if (*token < 0) continue;
      PTQ4VM_CHECK(!seen[*token], "the order of direction ", (direction - read) / length, " names token ", *token,
                   " twice");
      seen[*token] = 1;
    }
  }
  return values;
}

}  // namespace ptq4vm
