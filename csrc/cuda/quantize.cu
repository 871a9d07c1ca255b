// ops.quantize, ops.choose_qparams and ops.dequantize, bit for bit; so is ops.gate_quantize without SiLU, with it codes
// may differ from the reference's by one at rounding ties. A team of up to a warp reads a row once, 8 channels a thread
// where rows are aligned to that, one elsewhere.
#include <cfloat>

#include "device.cuh"

namespace ptq4vm::cuda {
namespace {

constexpr int THREADS = 128, VECTOR = 8;

// The teams of a block, and the row of this thread's one.
struct Shape {
  dim3 grid, block;

  Shape(int64_t rows, int64_t vectors) {
    unsigned team = 1;
    while (team < WARP_SIZE && team < vectors) team *= 2;
    block = dim3(team, THREADS / team);
    grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, block.y)));
  }
};

__device__ int64_t own_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

template <class T, int N>
__global__ void __launch_bounds__(THREADS) quantize_rows(const Quantize q) {
  const int64_t row = own_row();
  if (row >= q.rows) return;
  const T* x = static_cast<const T*>(q.x) + row * q.channels;
  int8_t* to = q.codes + row * q.channels;
  const RowQParams qparams(q.qparams, row);
  for (int64_t d = threadIdx.x * N; d < q.channels; d += blockDim.x * N) {
    float value[N];
    load<N>(x + d, value);
    write_codes<N>(to + d, value, q.qparams.inv_smooth ? q.qparams.inv_smooth + d : nullptr, qparams);
  }
}

template <class T, class G, int N>
__global__ void __launch_bounds__(THREADS) gate_rows(const GateQuantize q) {
  const int64_t row = own_row();
  if (row >= q.batch * q.tokens) return;
  const int64_t token = remainder(row, q.tokens), image = (row - token) / q.tokens;
  const T* x = static_cast<const T*>(q.x.data) + image * q.x.image + token * q.x.row;
  const G* gate = static_cast<const G*>(q.gate.data) + image * q.gate.image + token * q.gate.row;
  int8_t* to = q.codes + row * q.channels;
  const RowQParams qparams(q.qparams, row);
  for (int64_t d = threadIdx.x * N; d < q.channels; d += blockDim.x * N) {
    float total[N] = {};
    for (int64_t k = 0; k < q.terms; k++) {
      float value[N], factor[N];
      load<N>(x + k * q.x_term + d, value);
      load<N>(gate + k * q.gate_term + d, factor);
#pragma unroll
      for (int i = 0; i < N; i++) {
        total[i] = __fadd_rn(total[i], __fmul_rn(value[i], q.silu ? silu(factor[i]) : factor[i]));
      }
    }
    write_codes<N>(to + d, total, q.qparams.inv_smooth ? q.qparams.inv_smooth + d : nullptr, qparams);
  }
}

// Returns whether all rows of all terms are aligned to vectors.
template <class T>
bool aligned_rows(const Rows& rows, int64_t term) {
  return aligned<VECTOR>(static_cast<const T*>(rows.data)) && (rows.image | rows.row | term) % VECTOR == 0;
}

// A warp has a row.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) choose_rows(const ChooseQParams q) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP_SIZE) + threadIdx.x / WARP_SIZE;
  if (row >= q.rows) return;
  const int lane = threadIdx.x % WARP_SIZE;
  const T* x = static_cast<const T*>(q.x) + row * q.channels;
  float low = 0.0f, high = 0.0f;
  bool ordered = true;
  for (int64_t d = lane * N; d < q.channels; d += WARP_SIZE * N) {
    float value[N], smooth[N];
    load<N>(x + d, value);
    if (q.inv_smooth) load<N>(q.inv_smooth + d, smooth);
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (q.inv_smooth) value[i] = __fmul_rn(value[i], smooth[i]);
      low = fminf(low, value[i]);
      high = fmaxf(high, value[i]);
      ordered = ordered && value[i] == value[i];
    }
  }
  low = warp_reduce(low, [](float a, float b) { return fminf(a, b); });
  high = warp_reduce(high, [](float a, float b) { return fmaxf(a, b); });
  if (!__all_sync(ALL_LANES, ordered)) low = high = NAN;
  const float wide = __fdiv_rn(high - low, static_cast<float>(q.high - q.low)), scale = wide < FLT_MIN ? FLT_MIN : wide;
  const float zero = static_cast<float>(q.low) - rintf(__fdiv_rn(low, scale));
  if (lane == 0) {
    q.scale[row] = scale;
    // Zero lies in the range, so that its code needs no bounds; a row with NaN has no range.
    q.zero_point[row] = zero == zero ? static_cast<int>(zero) : 0;
  }
}

template <int N>
__global__ void __launch_bounds__(THREADS) dequantize_rows(const Dequantize q) {
  const int64_t row = own_row();
  if (row >= q.rows) return;
  const int64_t set = remainder(row, q.scales);
  const float scale = q.scale[set], zero = static_cast<float>(q.zero_point[set]);
  for (int64_t d = threadIdx.x * N; d < q.channels; d += blockDim.x * N) {
    const int64_t at = row * q.channels + d;
    const auto codes = *reinterpret_cast<const Vector<int8_t, N>*>(q.x + at);
    float value[N];
#pragma unroll
    for (int i = 0; i < N; i++) value[i] = __fmul_rn(static_cast<float>(codes.values[i]) - zero, scale);
    store<N>(q.y + at, value);
  }
}

}  // namespace

void run(const Quantize& q, Stream stream) {
  with_type(q.x_type, [&](auto type) {
    using T = decltype(type);
    const bool vectors = q.channels % VECTOR == 0 && aligned<VECTOR>(static_cast<const T*>(q.x)) &&
                         aligned<VECTOR>(q.codes) && aligned<VECTOR>(q.qparams.inv_smooth);
    const Shape shape(q.rows, vectors ? q.channels / VECTOR : q.channels);
    PTQ4VM_LAUNCH(vectors ? quantize_rows<T, VECTOR> : quantize_rows<T, 1>, shape.grid, shape.block, 0, stream, q);
  });
}

void run(const GateQuantize& q, Stream stream) {
  with_type(q.x.type, [&](auto x_type) {
    with_type(q.gate.type, [&](auto gate_type) {
      using T = decltype(x_type);
      using G = decltype(gate_type);
      const bool vectors = q.channels % VECTOR == 0 && aligned_rows<T>(q.x, q.x_term) &&
                           aligned_rows<G>(q.gate, q.gate_term) && aligned<VECTOR>(q.codes) &&
                           aligned<VECTOR>(q.qparams.inv_smooth);
      const Shape shape(q.channels ? q.batch * q.tokens : 0, vectors ? q.channels / VECTOR : q.channels);
      PTQ4VM_LAUNCH(vectors ? gate_rows<T, G, VECTOR> : gate_rows<T, G, 1>, shape.grid, shape.block, 0, stream, q);
    });
  });
}

void run(const ChooseQParams& q, Stream stream) {
  with_type(q.x_type, [&](auto type) {
    using T = decltype(type);
    const bool vectors =
        q.channels % VECTOR == 0 && aligned<VECTOR>(static_cast<const T*>(q.x)) && aligned<VECTOR>(q.inv_smooth);
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(q.rows, THREADS / WARP_SIZE)));
    PTQ4VM_LAUNCH(vectors ? choose_rows<T, VECTOR> : choose_rows<T, 1>, grid, THREADS, 0, stream, q);
  });
}

void run(const Dequantize& q, Stream stream) {
  const bool vectors = q.channels % VECTOR == 0 && aligned<VECTOR>(q.x) && aligned<VECTOR>(q.y);
  const Shape shape(q.rows, vectors ? q.channels / VECTOR : q.channels);
  PTQ4VM_LAUNCH(vectors ? dequantize_rows<VECTOR> : dequantize_rows<1>, shape.grid, shape.block, 0, stream, q);
}

}  // namespace ptq4vm::cuda
