// CUTLASS 2.x: cp.async, ldmatrix and the integer mma of compute capability 8.0, with LinearEpilogue.
#pragma once

#include "epilogue.cuh"  // before CUTLASS, which the tests compile for the CPU

#include <cutlass/gemm/threadblock/default_mma.h>
#include <cutlass/gemm/threadblock/threadblock_swizzle.h>
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/epilogue/threadblock/default_epilogue_tensor_op.h>
#include <cutlass/epilogue/threadblock/epilogue_base_streamk.h>
#include <cutlass/epilogue/threadblock/epilogue_with_visitor_callbacks.h>

#include "tiles.h"
#include "visitor.cuh"

namespace ptq4vm::cuda {

template <class Gemm>
__global__ void __launch_bounds__(Gemm::THREADS, 2)
    linear_kernel(const __grid_constant__ typename Gemm::Params params) {
  PTQ4VM_DYNAMIC_SHARED(typename Gemm::SharedStorage, shared);
  Gemm::run(params, *shared);
}

template <class Code, int ROWS, int FEATURES, bool CODES>
struct Gemm {
  static constexpr int BITS = cutlass::sizeof_bits<Code>::value;
  static constexpr int ALIGNED = 128 / BITS;      // codes
  static constexpr int CHANNELS = 64 * 8 / BITS;  // of a stage: 64 bytes of every row
  static constexpr int STAGES = 3;
  using Block = cutlass::gemm::GemmShape<ROWS, FEATURES, CHANNELS>;
  using Warp = cutlass::gemm::GemmShape<ROWS / 2, 32, CHANNELS>;
  using Instruction = cutlass::gemm::GemmShape<16, 8, CHANNELS / 2>;
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;
  // The multiplication that saturates is the only one; no sum comes near the ends of int32.
  using Mma = typename cutlass::gemm::threadblock::DefaultMma<
      Code, cutlass::layout::RowMajor, ALIGNED, Code, cutlass::layout::ColumnMajor, ALIGNED, int,
      cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block, Warp, Instruction, STAGES,
      cutlass::arch::OpMultiplyAddSaturate>::ThreadblockMma;
  // Says how threads share a tile, and nothing of results.
  using Output = cutlass::epilogue::thread::LinearCombination<cutlass::half_t, WIDTH, int, float>;
  using Sharing = typename cutlass::epilogue::threadblock::DefaultEpilogueTensorOp<Block, typename Mma::Operator, 1,
                                                                                   Output, WIDTH>::Epilogue;
  using Visitor = LinearVisitor<typename Sharing::OutputTileIterator::ThreadMap, Block, LinearEpilogue<CODES>>;
  using Epilogue = cutlass::epilogue::threadblock::EpilogueWithVisitorCallbacks<Sharing, Visitor, 1>;
  static constexpr int THREADS = WARP_SIZE * Mma::WarpCount::kCount;

  struct Params {
    LinearEpilogue<CODES> epilogue;
    typename Mma::IteratorA::Params x;
    typename Mma::IteratorB::Params weight;
    cutlass::gemm::GemmCoord tiles;
    int order;  // of tiles, so that those which run at once share rows and output channels
  };

  union SharedStorage {
    typename Mma::SharedStorage mma;
    typename Epilogue::SharedStorage epilogue;
  };

  __device__ static void run(const Params& params, SharedStorage& shared) {
    const LinearProblem& p = params.epilogue.p;
    const auto tile = Swizzle().get_tile_offset(params.order);
    if (tile.m() >= params.tiles.m() || tile.n() >= params.tiles.n()) return;
    const int rows = static_cast<int>(p.rows), features = static_cast<int>(p.features);
    const int channels = static_cast<int>(p.channels), thread = threadIdx.x;
    const int64_t row_bytes = p.channels * BITS / 8;  // pointers to codes of 4 bits count bytes too
    auto* x = const_cast<Code*>(static_cast<const Code*>(p.x)) + tile.k() * p.rows * row_bytes;
    auto* weight = const_cast<Code*>(static_cast<const Code*>(p.weight)) + tile.k() * p.features * row_bytes;
    typename Mma::IteratorA from_x(params.x, x, {rows, channels}, thread, {tile.m() * ROWS, 0});
    typename Mma::IteratorB from_weight(params.weight, weight, {channels, features}, thread, {0, tile.n() * FEATURES});
    const int warp = __shfl_sync(ALL_LANES, thread / WARP_SIZE, 0), lane = thread % WARP_SIZE;  // one for all lanes
    typename Mma::FragmentC acc;
    acc.clear();
    Mma mma(shared.mma, thread, warp, lane);
    if (channels > 0) mma(ceil_div(channels, CHANNELS), acc, from_x, from_weight, acc);  // without any it reads too far
    Epilogue epilogue(params.epilogue, shared.epilogue, thread, warp, lane);
    epilogue(acc, tile, 0, thread);
  }

  static void launch(const LinearProblem& p, Stream stream) {
    const cutlass::gemm::GemmCoord size(static_cast<int>(p.rows), static_cast<int>(p.features), 1);
    const auto tiles = Swizzle::get_tiled_shape(size, {ROWS, FEATURES, 1}, static_cast<int>(p.directions));
    const Params params{LinearEpilogue<CODES>(p), cutlass::layout::RowMajor(p.channels),
                        cutlass::layout::ColumnMajor(p.channels), tiles, Swizzle::get_log_tile(tiles)};
    const auto grid = Swizzle::get_grid_shape(tiles);
    PTQ4VM_LAUNCH(linear_kernel<Gemm>, {grid.x, grid.y, grid.z}, THREADS, sizeof(SharedStorage), stream, params);
  }
};

template <class Code, bool CODES>
void launch_tile(const LinearProblem& p, Stream stream) {
  switch (choose_tile(TILES, p.directions, p.rows, p.features)) {
    case Tile::rows64_features64: return Gemm<Code, 64, 64, CODES>::launch(p, stream);
    case Tile::rows64_features128: return Gemm<Code, 64, 128, CODES>::launch(p, stream);
    case Tile::rows128_features128: return Gemm<Code, 128, 128, CODES>::launch(p, stream);
  }
}

template <class Code>
bool launch_linear(const LinearProblem& p, Stream stream) {
  if (!fits_a_launch(p)) return false;
  if (p.rows == 0 || p.features == 0 || p.directions == 0) return true;
  p.codes ? launch_tile<Code, true>(p, stream) : launch_tile<Code, false>(p, stream);
  return true;
}

}  // namespace ptq4vm::cuda
