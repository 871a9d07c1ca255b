// Stands in for CUTLASS's header of this name on the CPU: a kernel whose blocks are one warp group with one tile, whose
// sums are plain loops, and which hands them to the epilogue in the threads that wgmma would leave them in.
#pragma once

#include <cuda_runtime.h>

#include "cute/tensor.hpp"
#include "cutlass/gemm/gemm.h"

namespace cutlass {
namespace gemm {
namespace kernel {

template <class Problem, class Mainloop, class Epilogue>
struct GemmUniversal {
  using Tile = typename Mainloop::TileShape;
  using Mma = typename Mainloop::TiledMma;
  static constexpr int MaxThreadsPerBlock = size(Mma{}), SharedStorageSize = 0;

  struct Arguments {
    GemmUniversalMode mode;
    Problem size;
    typename Mainloop::Arguments mainloop;
    typename Epilogue::Arguments epilogue;
  };
  using Params = Arguments;

  static Params to_underlying_arguments(const Arguments& arguments, void*) { return arguments; }

  static dim3 get_grid_shape(const Params& params) {
    const auto tiles = cute::ceil_div(cute::take<0, 2>(params.size), cute::take<0, 2>(Tile{}));
    return dim3(cute::get<0>(tiles), cute::get<1>(tiles), cute::get<3>(params.size));
  }

  static dim3 get_block_shape() { return dim3(MaxThreadsPerBlock); }

  void operator()(const Params& params, char*) const {
    using namespace cute;
    const auto [rows, columns, depth, batches] = params.size;
    const auto at = make_coord(int(blockIdx.x), int(blockIdx.y), _, int(blockIdx.z));
    const Tensor a = make_tensor(params.mainloop.ptr_A, make_shape(rows, depth, batches), params.mainloop.dA);
    const Tensor b = make_tensor(params.mainloop.ptr_B, make_shape(columns, depth, batches), params.mainloop.dB);
    Tensor sums = partition_fragment_C(Mma{}, take<0, 2>(Tile{}));
    const Tensor places = Mma{}.get_slice(threadIdx.x).partition_C(make_identity_tensor(take<0, 2>(Tile{})));
    for (int i = 0; i < size(sums); i++) {
      const int row = get<0>(at) * get<0>(Tile{}) + get<0>(places(i));
      const int column = get<1>(at) * get<1>(Tile{}) + get<1>(places(i));
      sums(i) = 0;
      if (row >= rows || column >= columns) continue;
      for (int k = 0; k < depth; k++) sums(i) += a(row, k, get<3>(at)) * b(column, k, get<3>(at));
    }
    typename Epilogue::TensorStorage storage;
    Epilogue(params.epilogue, storage)(params.size, Tile{}, at, sums, Mma{}, nullptr, threadIdx.x, nullptr);
  }
};

}  // namespace kernel
}  // namespace gemm
}  // namespace cutlass
