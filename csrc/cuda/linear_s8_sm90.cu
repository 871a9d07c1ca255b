// int8 by int8 on compute capability 9.0, compiled for sm_90a only: no other GPU has these instructions. CUTLASS 3.x:
// TMA, mbarriers and the integer wgmma, with LinearEpilogue. Of a block's three warp groups one loads; the others take
// tiles in turn, so that one multiplies while the other stores.
#ifndef NDEBUG
#define NDEBUG  // CUTLASS's assertions are function calls, around which wgmma waits
#endif

#include <algorithm>

#include "epilogue_sm90.cuh"

#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "tiles.h"

namespace ptq4vm::cuda {
namespace {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, 1)
    linear_s8_sm90_kernel(const __grid_constant__ typename Kernel::Params params) {
  PTQ4VM_DYNAMIC_SHARED(char, shared);
  Kernel()(params, shared);
}

template <int ROWS, int FEATURES, bool CODES>
struct GemmSm90 {
  using Tile = cute::Shape<cute::Int<ROWS>, cute::Int<FEATURES>, cute::_128>;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<LinearEpilogueSm90<CODES>>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
      cutlass::layout::ColumnMajor, 16, int, Tile, cute::Shape<cute::_1, cute::_1, cute::_1>,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

  static void launch(const LinearProblem& p, Stream stream) {
    const typename Kernel::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(p.rows), static_cast<int>(p.features), static_cast<int>(p.channels),
         static_cast<int>(p.directions)},
        {static_cast<const int8_t*>(p.x),
         {p.channels, {}, p.rows * p.channels},
         static_cast<const int8_t*>(p.weight),
         {p.channels, {}, p.features * p.channels}},
        LinearEpilogue<CODES>(p)};  // on every multiprocessor of the current device
    const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
    PTQ4VM_LAUNCH(linear_s8_sm90_kernel<Kernel>, Kernel::get_grid_shape(params), Kernel::get_block_shape(),
                  Kernel::SharedStorageSize, stream, params);
  }
};

template <bool CODES>
void launch_tile(const LinearProblem& p, Stream stream) {
  switch (choose_tile(TILES_SM90, p.directions, p.rows, p.features)) {
    case Tile::rows128_features128: return GemmSm90<128, 128, CODES>::launch(p, stream);
    default: return GemmSm90<64, 128, CODES>::launch(p, stream);
  }
}

}  // namespace

bool linear_s8_sm90(const LinearProblem& p, Stream stream) {
  // The tensor memory accelerator has no empty tensors, and strides below 2^40.
  const int64_t most = std::max(p.rows, p.features) * p.channels;
  if (!fits_a_launch(p) || p.channels == 0 || most >= int64_t{1} << 40) return false;
  if (p.rows == 0 || p.features == 0 || p.directions == 0) return true;
  p.codes ? launch_tile<true>(p, stream) : launch_tile<false>(p, stream);
  return true;
}

}  // namespace ptq4vm::cuda
