// ops.norm_quantize: the sum with the residual, RMS norm or layer norm, a rotation, and the codes, in one pass over
// memory. A warp has a row of up to 1024 channels and a block one of more; its values stay in registers, or are read
// again where rows are longer than those or at no alignment. Sums have one order; codes may differ from the reference's
// by one at rounding ties.
#include "rotate.cuh"

namespace ptq4vm::cuda {
namespace {

constexpr int THREADS = WARPS_IN_BLOCK * WARP_SIZE, VECTOR = 8, NEIGHBOURS = 4;

// The values of x + residual that a thread has: ITEMS times N neighbours, or with ITEMS = 0 any number, not kept.
template <class T, int WARPS, int N, int ITEMS>
class NormRow {
 public:
  __device__ NormRow(const NormQuantize& q, int64_t row)
      : x_(static_cast<const T*>(q.x) + row * q.channels),
        residual_(q.residual ? q.residual + row * q.channels : nullptr), channels_(q.channels) {
    float* total = q.total ? q.total + row * q.channels : nullptr;
    if (ITEMS == 0 && !total) return;
    over_channels([&]([[maybe_unused]] int item, int64_t d) {
      float value[N];
      read(d, value);
      if (total) store<N>(total + d, value);
      if constexpr (ITEMS > 0) {
#pragma unroll
        for (int i = 0; i < N; i++) kept_[item][i] = value[i];
      }
    });
  }

  // visit(d, value) for every N neighbours from d on.
  template <class Visit>
  __device__ void each(Visit visit) const {
    over_channels([&]([[maybe_unused]] int item, int64_t d) {
      float value[N];
      if constexpr (ITEMS == 0) {
        read(d, value);
      } else {
#pragma unroll
        for (int i = 0; i < N; i++) value[i] = kept_[item][i];
      }
      visit(d, value);
    });
  }

 private:
  template <class F>
  __device__ void over_channels(F f) const {
    constexpr int STRIDE = Team<WARPS>::SIZE * N;
    int64_t d = Team<WARPS>::rank() * N;
    if constexpr (ITEMS == 0) {
      for (; d < channels_; d += STRIDE) f(0, d);
    } else {
#pragma unroll
      for (int item = 0; item < ITEMS; item++, d += STRIDE) {
        if (d < channels_) f(item, d);
      }
    }
  }

  __device__ void read(int64_t d, float (&value)[N]) const {
    load<N>(x_ + d, value);
    if (!residual_) return;
    float other[N];
    load<N>(residual_ + d, other);
#pragma unroll
    for (int i = 0; i < N; i++) value[i] += other[i];
  }

  const T* x_;
  const float* residual_;
  int64_t channels_;
  float kept_[ITEMS ? ITEMS : 1][N];
};

template <class T, int WARPS, int N, int ITEMS, bool ROTATED>
__global__ void __launch_bounds__(THREADS)
    norm_rows(const NormQuantize q, const __grid_constant__ RotationOnDevice rotation) {
  PTQ4VM_SHARED(float, scratch, [WARPS]);
  PTQ4VM_DYNAMIC_SHARED(float, rotated_rows);
  const int64_t row = own_row<WARPS>();
  if (row >= q.rows) return;
  const NormRow<T, WARPS, N, ITEMS> values(q, row);
  const float share = 1.0f / static_cast<float>(q.channels);
  const auto mean_of = [&](auto term) {
    float total = 0.0f;
    values.each([&](int64_t, const float(&value)[N]) {
#pragma unroll
      for (int i = 0; i < N; i++) total += term(value[i]);
    });
    return block_sum<WARPS>(total, scratch) * share;
  };
  const float mean = q.rms ? 0.0f : mean_of([](float value) { return value; });
  const float variance = mean_of([=](float value) { return (value - mean) * (value - mean); });
  const float scale = 1.0f / sqrtf(variance + q.eps);
  const RowQParams qparams(q.qparams, row);
  const float* inv_smooth = q.qparams.inv_smooth;
  int8_t* to = q.codes + row * q.channels;
  float* turned = own_shared<WARPS>(rotated_rows, rotation.channels);
  values.each([&](int64_t d, float(&value)[N]) {
    float weight[N], bias[N], smooth[N];
    if (q.weight) load<N>(q.weight + d, weight);
    if (q.bias) load<N>(q.bias + d, bias);
    if (inv_smooth) load<N>(inv_smooth + d, smooth);
#pragma unroll
    for (int i = 0; i < N; i++) {
      value[i] = (value[i] - mean) * scale;
      if (q.weight) value[i] *= weight[i];
      if (q.bias) value[i] += bias[i];
      if (inv_smooth) value[i] = __fmul_rn(value[i], smooth[i]);
      if (ROTATED) turned[place(static_cast<int>(d) + i)] = value[i];
    }
    if (!ROTATED) write_codes<N>(to + d, value, nullptr, qparams);
  });
  if (!ROTATED) return;
  Team<WARPS>::sync();
  constexpr int M = N == 1 ? 1 : NEIGHBOURS;
  rotate_row<WARPS, M>(rotation, turned,
                       [=](int d, const float(&value)[M]) { write_codes<M>(to + d, value, nullptr, qparams); });
}

template <class T, int WARPS, int N, int ITEMS>
void launch(const NormQuantize& q, Stream stream) {
  const auto kernel = q.rotation ? norm_rows<T, WARPS, N, ITEMS, true> : norm_rows<T, WARPS, N, ITEMS, false>;
  const size_t bytes = q.rotation ? shared_bytes<WARPS>(q.channels) : 0;
  PTQ4VM_LAUNCH(kernel, grid_of<WARPS>(q.rows), THREADS, bytes, stream, q,
                RotationOnDevice(q.rotation ? *q.rotation : Rotation{}));
}

template <class T>
void launch_rows(const NormQuantize& q, Stream stream) {
  constexpr int64_t STRIDE = WARP_SIZE * VECTOR;
  const bool vectors = q.channels % VECTOR == 0 && aligned<VECTOR>(static_cast<const T*>(q.x)) &&
                       aligned<VECTOR>(q.residual) && aligned<VECTOR>(q.total) && aligned<VECTOR>(q.weight) &&
                       aligned<VECTOR>(q.bias) && aligned<VECTOR>(q.qparams.inv_smooth) && aligned<VECTOR>(q.codes);
  if (!vectors || q.channels > 4 * WARPS_IN_BLOCK * STRIDE) return launch<T, WARPS_IN_BLOCK, 1, 0>(q, stream);
  if (q.channels <= 2 * STRIDE) return launch<T, 1, VECTOR, 2>(q, stream);
  if (q.channels <= 4 * STRIDE) return launch<T, 1, VECTOR, 4>(q, stream);
  if (q.channels <= 2 * WARPS_IN_BLOCK * STRIDE) return launch<T, WARPS_IN_BLOCK, VECTOR, 2>(q, stream);
  launch<T, WARPS_IN_BLOCK, VECTOR, 4>(q, stream);
}

}  // namespace

void run(const NormQuantize& q, Stream stream) {
  with_type(q.x_type, [&](auto type) { launch_rows<decltype(type)>(q, stream); });
}

}  // namespace ptq4vm::cuda
