// The end of a linear: its accumulators become outputs, rounded as linears.rescale and ops.quantize do: each
// product and each sum on its own. A thread takes eight neighbours of a row at a time.
#pragma once

#include "device.cuh"
#include "linear.h"

namespace ptq4vm::cuda {

constexpr int WIDTH = 8;

template <class T>
__device__ inline Vector<T, WIDTH> read_eight(const T* from, int count, bool whole, T otherwise) {
  if (from && whole) return *reinterpret_cast<const Vector<T, WIDTH>*>(from);
  Vector<T, WIDTH> to;
#pragma unroll
  for (int i = 0; i < WIDTH; i++) to.values[i] = from && i < count ? from[i] : otherwise;
  return to;
}

template <class T, int N>
__device__ inline void write_run(T* to, const Vector<T, N>& from, int count, bool whole) {
  if (whole) {
    *reinterpret_cast<Vector<T, N>*>(to) = from;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (i < count) to[i] = from.values[i];
  }
}

// The parameters of a row.
struct LinearRow {
  int zero_point;
  float x_scale;
  RowQParams qparams{0.0f, 0, 0, 0};  // of its codes
};

// The parameters of eight output channels.
struct LinearColumns {
  Vector<int, WIDTH> weight_sum;
  Vector<float, WIDTH> weight_scale, bias, inv_smooth;
};

// CODES: of the GELU, instead of y.
template <bool CODES>
struct LinearEpilogue {
  LinearProblem p;
  bool whole;  // eight values go at once

  LinearEpilogue() = default;

  explicit LinearEpilogue(const LinearProblem& problem) : p(problem) {
    whole = p.features % WIDTH == 0 && (!CODES || p.codes_row % WIDTH == 0);
    for (const void* address : {static_cast<const void*>(p.weight_sum), static_cast<const void*>(p.weight_scale),
                                static_cast<const void*>(p.bias), static_cast<const void*>(p.qparams.inv_smooth),
                                static_cast<const void*>(p.codes), static_cast<const void*>(p.y)}) {
      whole = whole && reinterpret_cast<uintptr_t>(address) % 16 == 0;
    }
  }

  __device__ LinearRow row(int64_t direction, uint32_t row) const {
    const int64_t at = direction * p.scales + row % static_cast<uint32_t>(p.scales);
    LinearRow r{p.zero_point[at], p.x_scale[at]};
    if (CODES) {
      const QParams& q = p.qparams;
      const uint32_t next = row % static_cast<uint32_t>(q.scales);
      r.qparams = RowQParams(q.inv_scale[next], q.zero_point[next], q.low, q.high);
    }
    return r;
  }

  __device__ LinearColumns columns(int64_t direction, int column) const {
    const int64_t at = direction * p.features + column;
    const int count = static_cast<int>(p.features) - column;
    const float* bias = p.bias ? p.bias + at : nullptr;
    const float* inv_smooth = CODES && p.qparams.inv_smooth ? p.qparams.inv_smooth + at : nullptr;
    const bool all = whole && count > 0;
    return {read_eight(p.weight_sum + at, count, all, 0), read_eight(p.weight_scale + at, count, all, 0.0f),
            read_eight(bias, count, all, -0.0f),  // x + -0 is x, for every x
            read_eight(inv_smooth, count, all, 1.0f)};
  }

  __device__ void store(int64_t direction, int64_t row, int column, const LinearRow& r, const LinearColumns& c,
                        const int* acc) const {
    float value[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      const float exact = __int2float_rn(acc[i] - r.zero_point * c.weight_sum.values[i]);
      const float scaled = __fmul_rn(__fmul_rn(exact, r.x_scale), c.weight_scale.values[i]);
      value[i] = __fadd_rn(scaled, c.bias.values[i]);
    }
    const int64_t index = direction * p.rows + row;
    const int count = static_cast<int>(p.features) - column;
    if (CODES) {
      store_codes(p.codes + index * p.codes_row + (p.nibbles ? column / 2 : column), value, r.qparams, c, count);
    } else if (p.y_type == Float::f16) {
      store_as(static_cast<float16*>(p.y) + index * p.features + column, value, count);
    } else if (p.y_type == Float::bf16) {
      store_as(static_cast<bfloat16*>(p.y) + index * p.features + column, value, count);
    } else {
      store_as(static_cast<float*>(p.y) + index * p.features + column, value, count);
    }
  }

 private:
  template <class T>
  __device__ void store_as(T* to, const float (&value)[WIDTH], int count) const {
    Vector<T, WIDTH> y;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) y.values[i] = from_float<T>(value[i]);
    write_run(to, y, count, whole);
  }

  __device__ void store_codes(uint8_t* to, const float (&value)[WIDTH], const RowQParams& qparams,
                              const LinearColumns& c, int count) const {
    int codes[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) codes[i] = qparams.code(__fmul_rn(gelu(value[i]), c.inv_smooth.values[i]));
    if (p.nibbles) {
      Vector<uint8_t, WIDTH / 2> pairs;
#pragma unroll
      for (int i = 0; i < WIDTH / 2; i++) {
        const int high = 2 * i + 1 < count ? codes[2 * i + 1] : 0;
        pairs.values[i] = static_cast<uint8_t>((codes[2 * i] & 15) | high << 4);
      }
      write_run(to, pairs, (count + 1) / 2, whole);
    } else {
      Vector<uint8_t, WIDTH> bytes;
#pragma unroll
      for (int i = 0; i < WIDTH; i++) bytes.values[i] = static_cast<uint8_t>(codes[i]);
      write_run(to, bytes, count, whole);
    }
  }
};

}  // namespace ptq4vm::cuda
