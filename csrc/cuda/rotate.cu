// ops.rotate and ops.rotate_quantize. A row goes through shared memory, a warp's up to 1024 channels and a
// block's beyond; its result does not depend on the others.
#include "rotate.cuh"

namespace ptq4vm::cuda {
namespace {

constexpr int THREADS = WARPS_IN_BLOCK * WARP_SIZE, VECTOR = 8, NEIGHBOURS = 4;

// Into shared memory, N channels at once; smoothed where inv_smooth is not null.
template <class T, int WARPS, int N>
__device__ void fetch(const T* x, bool of_gelu, const float* inv_smooth, float* row, int channels) {
  for (int d = Team<WARPS>::rank() * N; d < channels; d += Team<WARPS>::SIZE * N) {
    float value[N], smooth[N];
    load<N>(x + d, value);
    if (inv_smooth) load<N>(inv_smooth + d, smooth);
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (of_gelu) value[i] = gelu(value[i]);
      row[place(d + i)] = inv_smooth ? __fmul_rn(value[i], smooth[i]) : value[i];
    }
  }
  Team<WARPS>::sync();
}

template <class T, int WARPS, bool VECTORS>
__global__ void __launch_bounds__(THREADS) rotate_rows(const Rotate q, const __grid_constant__ RotationOnDevice of) {
  constexpr int N = VECTORS ? NEIGHBOURS : 1;
  PTQ4VM_DYNAMIC_SHARED(float, rows);
  const int64_t row = own_row<WARPS>(), first = row * of.channels;
  if (row >= q.rows) return;
  float* values = own_shared<WARPS>(rows, of.channels);
  fetch<T, WARPS, VECTORS ? VECTOR : 1>(static_cast<const T*>(q.x) + first, false, nullptr, values, of.channels);
  T* y = static_cast<T*>(q.y) + first;
  rotate_row<WARPS, N>(of, values, [=](int d, const float(&value)[N]) { store<N>(y + d, value); });
}

template <class T, int WARPS, bool VECTORS>
__global__ void __launch_bounds__(THREADS)
    code_rows(const RotateQuantize q, const __grid_constant__ RotationOnDevice of) {
  constexpr int N = VECTORS ? NEIGHBOURS : 1;
  PTQ4VM_DYNAMIC_SHARED(float, rows);
  const int64_t row = own_row<WARPS>(), first = row * of.channels;
  if (row >= q.rows) return;
  float* values = own_shared<WARPS>(rows, of.channels);
  const float* inv_smooth = q.qparams.inv_smooth;
  fetch<T, WARPS, VECTORS ? VECTOR : 1>(static_cast<const T*>(q.x) + first, q.gelu, inv_smooth, values, of.channels);
  const RowQParams qparams(q.qparams, row);
  int8_t* to = q.codes + first;
  rotate_row<WARPS, N>(of, values,
                       [=](int d, const float(&value)[N]) { write_codes<N>(to + d, value, nullptr, qparams); });
}

// Calls run(T(), std::integral_constant WARPS) with the warps that a row of so many channels gets.
template <class F>
void with_team(Float type, int64_t channels, F run) {
  with_type(type, [&](auto t) {
    if (channels <= CHANNELS_OF_WARP) return run(t, std::integral_constant<int, 1>());
    run(t, std::integral_constant<int, WARPS_IN_BLOCK>());
  });
}

}  // namespace

void run(const Rotate& q, Stream stream) {
  with_team(q.type, q.rotation.channels, [&](auto type, auto warps) {
    using T = decltype(type);
    constexpr int W = decltype(warps)::value;
    const bool vectors = q.rotation.order % VECTOR == 0 && aligned<VECTOR>(static_cast<const T*>(q.x)) &&
                         aligned<NEIGHBOURS>(static_cast<const T*>(q.y));
    PTQ4VM_LAUNCH(vectors ? rotate_rows<T, W, true> : rotate_rows<T, W, false>, grid_of<W>(q.rows), THREADS,
                  shared_bytes<W>(q.rotation.channels), stream, q, RotationOnDevice(q.rotation));
  });
}

void run(const RotateQuantize& q, Stream stream) {
  with_team(q.x_type, q.rotation.channels, [&](auto type, auto warps) {
    using T = decltype(type);
    constexpr int W = decltype(warps)::value;
    const bool vectors = q.rotation.order % VECTOR == 0 && aligned<VECTOR>(static_cast<const T*>(q.x)) &&
                         aligned<NEIGHBOURS>(q.codes) && aligned<VECTOR>(q.qparams.inv_smooth);
    PTQ4VM_LAUNCH(vectors ? code_rows<T, W, true> : code_rows<T, W, false>, grid_of<W>(q.rows), THREADS,
                  shared_bytes<W>(q.rotation.channels), stream, q, RotationOnDevice(q.rotation));
  });
}

}  // namespace ptq4vm::cuda
