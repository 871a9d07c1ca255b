// Copies of codes into padded rows, a thread for every 16 bytes.
#include "repack.h"

#include "device.cuh"

namespace ptq4vm::cuda {
namespace {

constexpr int THREADS = 128, RUN = 16;  // codes that are read at once

struct CodeReader {
  const CodeMatrix& q;
  int64_t row;  // of all directions

  __device__ int of_pairs(int64_t at, bool high) const {
    const int pair = static_cast<const uint8_t*>(q.data)[at];
    return static_cast<int8_t>((high ? pair >> 4 : pair & 15) << 4) >> 4;
  }

  // Four channels of 16 rows after each other; of nibbles the last 8 rows are the high ones.
  __device__ int of_tiles(int64_t d) const {
    const int64_t direction = row / q.rows, own = row % q.rows;
    const int64_t groups = ceil_div<int64_t>(q.rows, 16), k_tiles = ceil_div<int64_t>(q.channels, 64);
    const int64_t tile = (direction * groups + own / 16) * k_tiles + d / 64;
    const int quad = static_cast<int>(d % 64 / 4), at = static_cast<int>(own % 16 * 4 + d % 4);
    if (q.layout == Layout::tiles) return static_cast<const int8_t*>(q.data)[(tile * 16 + quad) * 64 + at];
    return of_pairs((tile * 16 + quad) * 32 + at % 32, at >= 32);
  }

  __device__ int operator()(int64_t d) const {
    if (d >= q.channels) return 0;
    if (q.layout == Layout::bytes) return static_cast<const int8_t*>(q.data)[row * q.columns + d];
    if (q.layout == Layout::nibbles) return of_pairs(row * q.columns + d / 2, d % 2);
    return of_tiles(d);
  }
};

// VECTORS: codes are bytes, where a run is 16 of them at a multiple of 16.
template <bool VECTORS>
__device__ Vector<int8_t, RUN> read_run(const CodeMatrix& q, int64_t row, int64_t d) {
  Vector<int8_t, RUN> codes;
  if (VECTORS) {
    const int8_t* from = static_cast<const int8_t*>(q.data) + row * q.columns + d;
    return d < q.channels ? *reinterpret_cast<const Vector<int8_t, RUN>*>(from) : Vector<int8_t, RUN>{};
  }
  const CodeReader read{q, row};
#pragma unroll 1
  for (int i = 0; i < RUN; i++) codes.values[i] = static_cast<int8_t>(read(d + i));
  return codes;
}

template <bool VECTORS, bool NIBBLES>
__global__ void __launch_bounds__(THREADS)
    repack_runs(const CodeMatrix q, uint8_t* to, int64_t runs, int64_t runs_in_row) {
  const int64_t run = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (run >= runs) return;
  const int64_t row = run / runs_in_row, first = run % runs_in_row * (NIBBLES ? 2 * RUN : RUN);
  Vector<int8_t, RUN> bytes = read_run<VECTORS>(q, row, first);
  if (NIBBLES) {
    const Vector<int8_t, RUN> more = read_run<VECTORS>(q, row, first + RUN);
    Vector<int8_t, RUN> pairs;
#pragma unroll
    for (int i = 0; i < RUN / 2; i++) {
      pairs.values[i] = static_cast<int8_t>((bytes.values[2 * i] & 15) | bytes.values[2 * i + 1] << 4);
      pairs.values[RUN / 2 + i] = static_cast<int8_t>((more.values[2 * i] & 15) | more.values[2 * i + 1] << 4);
    }
    bytes = pairs;
  }
  *reinterpret_cast<Vector<int8_t, RUN>*>(to + run * RUN) = bytes;
}

// A warp has a row.
__global__ void __launch_bounds__(THREADS) sum_rows(const CodeMatrix q, int32_t* to) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP_SIZE) + threadIdx.x / WARP_SIZE;
  if (row >= q.directions * q.rows) return;
  const int lane = threadIdx.x % WARP_SIZE;
  const CodeReader read{q, row};
  int total = 0;
  for (int64_t d = lane; d < q.channels; d += WARP_SIZE) total += read(d);
  total = warp_sum(total);
  if (lane == 0) to[row] = total;
}

}  // namespace

void repack(const CodeMatrix& q, void* to, bool nibbles, int64_t padded, Stream stream) {
  const int64_t runs_in_row = padded / (nibbles ? 2 * RUN : RUN), runs = q.directions * q.rows * runs_in_row;
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(runs, THREADS)));
  const bool vectors = q.layout == Layout::bytes && (q.channels | q.columns) % RUN == 0 &&
                       aligned<RUN>(static_cast<const int8_t*>(q.data));
  const auto kernel = vectors ? (nibbles ? repack_runs<true, true> : repack_runs<true, false>)
                              : (nibbles ? repack_runs<false, true> : repack_runs<false, false>);
  PTQ4VM_LAUNCH(kernel, grid, THREADS, 0, stream, q, static_cast<uint8_t*>(to), runs, runs_in_row);
}

void sum_codes(const CodeMatrix& q, int32_t* to, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(q.directions * q.rows, THREADS / WARP_SIZE)));
  PTQ4VM_LAUNCH(sum_rows, grid, THREADS, 0, stream, q, to);
}

}  // namespace ptq4vm::cuda
