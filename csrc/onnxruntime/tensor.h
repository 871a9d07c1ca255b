// Tensors of ONNX Runtime, under the names of bindings/torch_tensor.h: contiguous memory that the runtime or the tensor
// itself owns.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

namespace ptq4vm {

// ONNX's numbers, in the names of torch's ScalarType.
enum class ScalarType : int32_t {
  Float = 1,
  Byte = 2,
  Char = 3,
  Short = 5,
  Int = 6,
  Long = 7,
  Bool = 9,
  Half = 10,
  Double = 11,
  ComplexFloat = 14,
  ComplexDouble = 15,
  BFloat16 = 16
};

class Shape {
 public:
  Shape(const int64_t* sizes, size_t axes) : sizes_(sizes), axes_(axes) {}
  Shape(const std::initializer_list<int64_t>& sizes) : Shape(std::data(sizes), sizes.size()) {}
  Shape(const std::vector<int64_t>& sizes) : Shape(sizes.data(), sizes.size()) {}

  const int64_t* data() const { return sizes_; }
  const int64_t* begin() const { return sizes_; }
  const int64_t* end() const { return sizes_ + axes_; }
  size_t size() const { return axes_; }

 private:
  const int64_t* sizes_;
  size_t axes_;
};

int64_t bytes_of(ScalarType);  // of an element; 1 of types that no operator takes

class Tensor {
 public:
  static constexpr size_t MAX_AXES = 8;

  // A view of memory that outlives it.
  Tensor(void* data, Shape sizes, ScalarType type);

  // Memory of its own.
  Tensor(Shape sizes, ScalarType type);

  int64_t dim() const { return axes_; }
  Shape sizes() const { return {sizes_.data(), static_cast<size_t>(axes_)}; }
  int64_t size(int64_t axis) const { return sizes_[axis]; }
  int64_t numel() const { return count_; }
  ScalarType scalar_type() const { return type_; }
  int64_t element_size() const { return bytes_of(type_); }
  bool is_contiguous() const { return true; }
  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }

  int64_t stride(int64_t axis) const {
    int64_t elements = 1;
    while (++axis < axes_) elements *= sizes_[axis];
    return elements;
  }

 private:
  void* data_;
  int64_t axes_, count_ = 1;
  std::array<int64_t, MAX_AXES> sizes_;
  ScalarType type_;
  std::shared_ptr<char[]> own_;
};

// A result at its place among an operator's results, in the runtime's memory if it is of the type that the model says.
Tensor empty_result(int place, const Tensor& on, Shape sizes, ScalarType type);

inline Tensor new_empty(const Tensor&, Shape sizes, ScalarType type) { return Tensor(sizes, type); }

Tensor clone(const Tensor&);

inline Tensor contiguous(const Tensor& x) { return x; }

// Numbers as another type of floating-point numbers, or integers as int32.
Tensor to(const Tensor&, ScalarType);

// How many threads of the runtime have worked so far, which no result depends on.
int64_t get_num_threads();

// Calls part(data, begin, end) for parts of [0, count) that are not shorter than `grain`, by threads of the runtime.
void run_parallel(int64_t count, int64_t grain, void (*part)(const void* data, int64_t, int64_t), const void* data);

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const auto shifted = [&](int64_t first, int64_t last) { f(begin + first, begin + last); };
  run_parallel(
      end - begin, grain,
      [](const void* data, int64_t first, int64_t last) {
        (*static_cast<const decltype(shifted)*>(data))(first, last);
      },
      &shifted);
}

}  // namespace ptq4vm
