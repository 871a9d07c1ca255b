// ops.rotate and ops.rotate_quantize. A row's result does not depend on the others.
#include "rotate.h"

#include "quantize.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

template <class T>
void rows(const Rotate& q, int64_t begin, int64_t end) {
  const int64_t D = q.rotation.channels;
  AlignedRow own(D);
  float* row = own.data();
  for (int64_t r = begin; r < end; r++) {
    const T* x = static_cast<const T*>(q.x) + r * D;
    T* y = static_cast<T*>(q.y) + r * D;
    for (int64_t d = 0; d < D; d += WIDTH) store_lanes(row + d, load_lanes(x + d, D - d), D - d);
    rotate_row(q.rotation, row, [=](int64_t d, f32xw value, int64_t count) { store_lanes(y + d, value, count); });
  }
}

template <class T, bool GELU>
void code_rows(const RotateQuantize& q, int64_t begin, int64_t end) {
  const int64_t D = q.rotation.channels;
  AlignedRow own(D);
  float* row = own.data();
  const float* inv_smooth = q.qparams.inv_smooth;
  for (int64_t r = begin; r < end; r++) {
    const T* x = static_cast<const T*>(q.x) + r * D;
    for (int64_t d = 0; d < D; d += WIDTH) {
      f32xw value = load_lanes(x + d, D - d);
      if (GELU) value = gelu(value);
      if (inv_smooth) value *= load_lanes(inv_smooth + d, D - d);
      store_lanes(row + d, value, D - d);
    }
    const RowQParams qparams(q.qparams, r);
    int8_t* codes = q.codes + r * D;
    rotate_row(q.rotation, row,
               [=](int64_t d, f32xw value, int64_t count) { store_codes(codes + d, value, qparams, count); });
  }
}

}  // namespace

void run(const Rotate& q, int64_t begin, int64_t end) {
  with_type(q.type, [&](auto t) { rows<decltype(t)>(q, begin, end); });
}

void run(const RotateQuantize& q, int64_t begin, int64_t end) {
  with_type(q.x_type, [&](auto t) {
    q.gelu ? code_rows<decltype(t), true>(q, begin, end) : code_rows<decltype(t), false>(q, begin, end);
  });
}

}  // namespace ptq4vm::PTQ4VM_SET
