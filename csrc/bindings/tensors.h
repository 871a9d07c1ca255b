// Tensors: errors, types, layouts, and memory for results. Bindings are compiled into a library of each device for torch:
// PTQ4VM_KEY says whose implementations they register, and PTQ4VM_CUDA that the kernels are csrc/cuda's. With
// PTQ4VM_ONNXRUNTIME they are compiled for ONNX Runtime, and the tensors are those of csrc/onnxruntime.
#pragma once

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../operators.h"
#ifdef PTQ4VM_ONNXRUNTIME
#include "../onnxruntime/tensor.h"
#else
#include "torch_tensor.h"
#endif

namespace ptq4vm {

using Optional = std::optional<Tensor>;

#ifdef PTQ4VM_CUDA
constexpr bool ON_GPU = true;
#else
constexpr bool ON_GPU = false;
#endif

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Unlike STD_TORCH_CHECK, says nothing of files and lines of ours.
#define PTQ4VM_CHECK(condition, ...) \
  if (__builtin_expect(!(condition), 0)) ::ptq4vm::fail(__VA_ARGS__)

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

inline std::string shape_text(Shape sizes) {
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

// The types that kernels read and write; every other one is converted to float32.
inline bool has_kernels(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || (ON_GPU && type == ScalarType::Half);
}

inline Float float_type(ScalarType type) {
  if (type == ScalarType::BFloat16) return Float::bf16;
  return ON_GPU && type == ScalarType::Half ? Float::f16 : Float::f32;
}

inline Float float_type(const Tensor& x) { return float_type(x.scalar_type()); }

template <class T>
const T* const_ptr(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* const_ptr(const Optional& x) {
  return x ? const_ptr<T>(*x) : nullptr;
}

template <class T>
T* mutable_ptr(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
T* mutable_ptr(Optional& x) {
  return x ? mutable_ptr<T>(*x) : nullptr;
}

// The sizes of x with other channels, its last axis.
inline std::vector<int64_t> with_channels(const Tensor& x, int64_t channels) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = channels;
  return shape;
}

inline int64_t channels_of(const Tensor& x) { return x.size(x.dim() - 1); }

inline int64_t rows_of(const Tensor& x) { return channels_of(x) ? x.numel() / channels_of(x) : 0; }

inline Tensor empty_like(const Tensor& x, Shape sizes, ScalarType type) { return new_empty(x, sizes, type); }

inline Tensor empty_like(const Tensor& x, ScalarType type) { return empty_like(x, x.sizes(), type); }

inline Tensor empty_result(int place, const Tensor& x, ScalarType type) {
  return empty_result(place, x, x.sizes(), type);
}

inline Tensor cast_like(const Tensor& value, const Tensor& original) {
  return value.scalar_type() == original.scalar_type() ? value : to(value, original.scalar_type());
}

// A view of bytes may begin anywhere.
inline bool is_aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % x.element_size() == 0;
}

// Calls of torch take longer than small kernels, so those that would do nothing are left out.
inline Tensor to_contiguous(const Tensor& x) {
  if (!x.is_contiguous()) return contiguous(x);
  return is_aligned(x) ? x : clone(x);
}

inline Tensor to_contiguous(const Tensor& x, ScalarType type) {
  return to_contiguous(x.scalar_type() == type ? x : to(x, type));
}

}  // namespace ptq4vm
