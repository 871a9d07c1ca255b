// reference.rotate: every row in the first cache, Hadamard's transform by butterflies, then Hartley's small one. A row's
// result does not depend on the others.
#include <vector>

#include "kernels.h"
#include "math.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

// Lanes whose numbers differ in the bit H become their sum and their difference.
template <int H>
inline f32x16 butterfly(f32x16 v) {
#define PTQ4VM_LANES                                                                                                   \
  0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H, 8 ^ H, 9 ^ H, 10 ^ H, 11 ^ H, 12 ^ H, 13 ^ H, 14 ^ H, 15 ^ H
#ifdef __clang__
  const f32x16 other = __builtin_shufflevector(v, v, PTQ4VM_LANES);
#else
  const f32x16 other = __builtin_shuffle(v, i32x16{PTQ4VM_LANES});
#endif
#undef PTQ4VM_LANES
  f32x16 sign;
  for (int lane = 0; lane < LANES; lane++) sign[lane] = lane & H ? -1.0f : 1.0f;
  return other + sign * v;
}

void hadamard(float* x, int64_t channels, int64_t order) {
  int64_t half = 1;
  if (order % LANES == 0) {
    for (int64_t d = 0; d < channels; d += LANES) {
      store(x + d, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + d))))));
    }
    half = LANES;
  }
  for (; half < order; half *= 2) {
    for (int64_t d = 0; d < channels; d += 2 * half) {
      for (int64_t i = d; i < d + half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
}

// y (size, order) = matrix (size, size) times x (size, order).
void mix(const float* matrix, const float* x, float* y, int64_t size, int64_t order) {
  for (int64_t j = 0; j < size; j++) {
    float* to = y + j * order;
    for (int64_t i = 0; i < order; i++) to[i] = matrix[j * size] * x[i];
    for (int64_t k = 1; k < size; k++) {
      const float factor = matrix[j * size + k], *from = x + k * order;
      for (int64_t i = 0; i < order; i++) to[i] += factor * from[i];
    }
  }
}

template <class T>
void rows(const Rotate& q, int64_t begin, int64_t end) {
  const int64_t D = q.channels, size = D / q.order;
  std::vector<float> own(D), mixed(D);
  for (int64_t r = begin; r < end; r++) {
    const T* x = static_cast<const T*>(q.x) + r * D;
    T* y = static_cast<T*>(q.y) + r * D;
    for (int64_t d = 0; d < D; d += WIDTH) store_lanes(own.data() + d, load_lanes(x + d, D - d), D - d);
    hadamard(own.data(), D, q.order);
    if (q.matrix) mix(q.matrix, own.data(), mixed.data(), size, q.order);
    const float* result = q.matrix ? mixed.data() : own.data();
    for (int64_t d = 0; d < D; d += WIDTH) store_lanes(y + d, load_lanes(result + d, D - d) * q.factor, D - d);
  }
}

}  // namespace

void rotate(const Rotate& q, int64_t begin, int64_t end) {
  q.type == Float::f32 ? rows<float>(q, begin, end) : rows<bfloat16>(q, begin, end);
}

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
