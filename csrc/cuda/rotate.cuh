// ops.rotate of rows in shared memory: Hadamard's transform by butterflies of 16 numbers in registers, then
// Hartley's small one. A team of WARPS warps has a row.
#pragma once

#include "device.cuh"

namespace ptq4vm::cuda {

// The threads of a row: one warp of several in a block, or the whole block.
template <int WARPS>
struct Team {
  static constexpr int SIZE = WARPS * WARP_SIZE;

  __device__ static int rank() { return threadIdx.x % SIZE; }

  // After it all threads of the team can read what one has written.
  __device__ static void sync() {
    if (WARPS == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

// Where channel d of a row lies. After 16 numbers there is a gap, so that neither neighbours nor strides of 16 meet in
// a bank. Runs of 4 from a multiple of 4 on have none.
__host__ __device__ inline int place(int d) { return d + d / 16; }

// A Rotation whose matrix travels with the kernel's arguments: no copy to the device, nothing to keep alive.
struct RotationOnDevice {
  int channels, order, size, log_order;  // size of the matrix, 1 without
  float factor;
  float matrix[MAX_HARTLEY * MAX_HARTLEY];

  explicit RotationOnDevice(const Rotation& q)
      : channels(static_cast<int>(q.channels)), order(static_cast<int>(q.order)),
        size(q.matrix ? static_cast<int>(q.channels / q.order) : 1), log_order(0), factor(q.factor), matrix{} {
    while (int64_t{1} << log_order < q.order) log_order++;
    for (int i = 0; q.matrix && i < size * size; i++) matrix[i] = q.matrix[i];
  }
};

constexpr int WARPS_IN_BLOCK = 4;
constexpr int64_t CHANNELS_OF_WARP = 1024;  // a row of more is a block's

// The rows of a block in shared memory, one after the other.
__host__ __device__ inline int shared_row(int channels) { return ceil_div(place(channels), 4) * 4; }

template <int WARPS>
size_t shared_bytes(int64_t channels) {
  return sizeof(float) * (WARPS_IN_BLOCK / WARPS) * shared_row(static_cast<int>(channels));
}

// The row of this thread's team.
template <int WARPS>
__device__ int64_t own_row() {
  return static_cast<int64_t>(blockIdx.x) * (WARPS_IN_BLOCK / WARPS) + threadIdx.x / Team<WARPS>::SIZE;
}

template <int WARPS>
__device__ float* own_shared(float* rows, int channels) {
  return rows + threadIdx.x / Team<WARPS>::SIZE * shared_row(channels);
}

template <int WARPS>
dim3 grid_of(int64_t rows) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, WARPS_IN_BLOCK / WARPS)));
}

// In every run of COUNT << log_half channels, those that are whole multiples of 1 << log_half apart.
template <int WARPS, int COUNT>
__device__ void butterflies(float* row, int channels, int log_half) {
  for (int group = Team<WARPS>::rank(); group < channels / COUNT; group += Team<WARPS>::SIZE) {
    const int within = group & ((1 << log_half) - 1), first = ((group - within) * COUNT) + within;
    float v[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = row[place(first + (i << log_half))];
#pragma unroll
    for (int half = 1; half < COUNT; half *= 2) {
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        if (i & half) continue;
        const float a = v[i], b = v[i | half];
        v[i] = a + b;
        v[i | half] = a - b;
      }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) row[place(first + (i << log_half))] = v[i];
  }
  Team<WARPS>::sync();
}

template <int WARPS>
__device__ void hadamard(float* row, int channels, int log_order) {
  for (int done = 0; done < log_order;) {
    const int left = log_order - done;
    if (left >= 4)
      butterflies<WARPS, 16>(row, channels, done), done += 4;
    else if (left == 3)
      butterflies<WARPS, 8>(row, channels, done), done += 3;
    else if (left == 2)
      butterflies<WARPS, 4>(row, channels, done), done += 2;
    else
      butterflies<WARPS, 2>(row, channels, done), done += 1;
  }
}

// The products with Hartley's matrix of SIZE rows, of q.size where SIZE is 0; those of N neighbours at once go to
// emit(d, value).
template <int WARPS, int SIZE, int N, class Emit>
__device__ void mix(const RotationOnDevice& q, const float* row, Emit emit) {
  const int size = SIZE ? SIZE : q.size;
  for (int at = Team<WARPS>::rank() * N; at < q.order; at += Team<WARPS>::SIZE * N) {
    float x[SIZE ? SIZE : 1][N];
#pragma unroll
    for (int k = 0; k < SIZE; k++) {
#pragma unroll
      for (int i = 0; i < N; i++) x[k][i] = row[place(k * q.order + at) + i];
    }
    for (int j = 0; j < size; j++) {
      float total[N] = {};
#pragma unroll(SIZE ? SIZE : 1)
      for (int k = 0; k < size; k++) {
        const float factor = q.matrix[j * size + k];
#pragma unroll
        for (int i = 0; i < N; i++) total[i] += factor * (SIZE ? x[SIZE ? k : 0][i] : row[place(k * q.order + at) + i]);
      }
#pragma unroll
      for (int i = 0; i < N; i++) total[i] = __fmul_rn(total[i], q.factor);
      emit(j * q.order + at, total);
    }
  }
}

template <int WARPS, int N, class Emit>
__device__ void scale_all(const RotationOnDevice& q, const float* row, Emit emit) {
  for (int d = Team<WARPS>::rank() * N; d < q.channels; d += Team<WARPS>::SIZE * N) {
    float value[N];
#pragma unroll
    for (int i = 0; i < N; i++) value[i] = __fmul_rn(row[place(d) + i], q.factor);
    emit(d, value);
  }
}

// Transforms a row, which the team has written and synced, and hands the result to emit(d, value), N neighbours
// at once: N is 4 where the order is a multiple of that, else 1.
template <int WARPS, int N, class Emit>
__device__ void rotate_row(const RotationOnDevice& q, float* row, Emit emit) {
  hadamard<WARPS>(row, q.channels, q.log_order);
  if (q.size == 1) {
    scale_all<WARPS, N>(q, row, emit);
  } else if (q.size == 3) {
    mix<WARPS, 3, N>(q, row, emit);
  } else {
    mix<WARPS, 0, N>(q, row, emit);
  }
}

}  // namespace ptq4vm::cuda
