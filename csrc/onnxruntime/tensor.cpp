// Memory of tensors, and the conversion of their numbers.
#include "../bindings/tensors.h"

#include <bit>
#include <cmath>

namespace ptq4vm {
namespace {

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float x) {
    const auto u = std::bit_cast<uint32_t>(x);
    bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct Half {
  uint16_t bits;

  Half() = default;
  explicit Half(float x) {
    const auto u = std::bit_cast<uint32_t>(x);
    const float size = std::fabs(x);
    uint32_t magnitude;
    if (x != x) {
      magnitude = 0x7e00;
    } else if (size >= 65520.0f) {
      magnitude = 0x7c00;
    } else if (size < 0x1p-14f) {  // the sum's last bits are multiples of the smallest number
      magnitude = std::bit_cast<uint32_t>(size + 0.5f) - std::bit_cast<uint32_t>(0.5f);
    } else {
      const uint32_t v = u & 0x7fffffff;
      magnitude = (v + 0xfff + ((v >> 13) & 1) - (112u << 23)) >> 13;
    }
    bits = static_cast<uint16_t>((u >> 16 & 0x8000) | magnitude);
  }
  explicit operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude < 0x400) return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, sign ? -1.0f : 1.0f);
    const uint32_t exponent = magnitude >= 0x7c00 ? 224u << 23 : 112u << 23;
    return std::bit_cast<float>(sign | ((magnitude << 13) + exponent));
  }
};

// Calls f with a null pointer to the type's numbers; returns whether it is a type of numbers.
template <class F>
bool with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Byte: return f(static_cast<uint8_t*>(nullptr)), true;
    case ScalarType::Char: return f(static_cast<int8_t*>(nullptr)), true;
    case ScalarType::Short: return f(static_cast<int16_t*>(nullptr)), true;
    case ScalarType::Int: return f(static_cast<int32_t*>(nullptr)), true;
    case ScalarType::Long: return f(static_cast<int64_t*>(nullptr)), true;
    case ScalarType::Half: return f(static_cast<Half*>(nullptr)), true;
    case ScalarType::BFloat16: return f(static_cast<BFloat16*>(nullptr)), true;
    case ScalarType::Float: return f(static_cast<float*>(nullptr)), true;
    case ScalarType::Double: return f(static_cast<double*>(nullptr)), true;
    default: return false;
  }
}

template <class T>
constexpr bool IS_SHORT_FLOAT = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;

template <class To, class From>
To converted(From x) {
  if constexpr (IS_SHORT_FLOAT<From> || IS_SHORT_FLOAT<To>) {
    return static_cast<To>(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}

}  // namespace

int64_t bytes_of(ScalarType type) {
  int64_t bytes = 1;
  with_type(type, [&]<class T>(T*) { bytes = sizeof(T); });
  return bytes;
}

Tensor::Tensor(void* data, Shape sizes, ScalarType type) : data_(data), axes_(sizes.size()), type_(type) {
  PTQ4VM_CHECK(sizes.size() <= MAX_AXES, "a tensor has ", sizes.size(), " axes, more than ", MAX_AXES);
  std::copy(sizes.begin(), sizes.end(), sizes_.begin());
  for (const int64_t size : sizes) count_ *= size;
}

Tensor::Tensor(Shape sizes, ScalarType type) : Tensor(nullptr, sizes, type) {
  own_.reset(new char[count_ * element_size()]);
  data_ = own_.get();
}

Tensor clone(const Tensor& x) {
  Tensor copy(x.sizes(), x.scalar_type());
  std::copy_n(const_ptr<char>(x), x.numel() * x.element_size(), mutable_ptr<char>(copy));
  return copy;
}

Tensor to(const Tensor& x, ScalarType type) {
  Tensor result(x.sizes(), type);
  const Tensor aligned = is_aligned(x) ? x : clone(x);
  bool done = false;
  with_type(aligned.scalar_type(), [&]<class From>(From*) {
    done = with_type(type, [&]<class To>(To*) {
      if constexpr (IS_SHORT_FLOAT<To> || !std::is_integral_v<To> || std::is_same_v<To, int32_t>) {
        const From* from = const_ptr<From>(aligned);
        std::transform(from, from + aligned.numel(), mutable_ptr<To>(result), converted<To, From>);
      } else {
        fail("nothing is converted to ", name(type));
      }
    });
  });
  PTQ4VM_CHECK(done, "numbers that are ", name(x.scalar_type()), " are not converted to ", name(type));
  return result;
}

}  // namespace ptq4vm
